"""Secrets as people put them where they do not belong, and what only looks like one. None is real."""

HEX = "0f1e2d3c4b5a69788796a5b4c3d2e1f001122334"  # 40 hexadecimal digits, as the keys of W&B were
LETTERS = "Zq7Xw2Lk9Rt4Vb6Nm1Pj8Hg3Fd5Sa0YcUe"

# By its own form, whatever holds it
FORMS = {
    "hugging_face": f"hf_{LETTERS}",
    "wandb": HEX,
    "wandb_local": f"local-{HEX[::-1]}",
    "wandb_v1": f"wandb_v1_{LETTERS}_{LETTERS[::-1]}",
    "openai": f"sk-proj-{LETTERS}",
    "github": f"ghp_{LETTERS}",
    "github_fine": f"github_pat_11{LETTERS}_{LETTERS}",
    "gitlab": f"glpat-{LETTERS[:20]}",
    "aws_id": "AKIAQ7XW2LK9RT4VB6NM",
    "slack": f"xoxb-123456789012-{LETTERS[:24]}",
    "google": f"AIza{LETTERS}",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJ{LETTERS[:20]}.{LETTERS[::-1][:30]}",
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\nMII{LETTERS}\n{LETTERS[::-1]}\n-----END RSA PRIVATE KEY-----",
}
# Part of a text: the text, and the secret in it
INSIDE = {
    "bearer": ("curl -H 'Authorization: Bearer q1w2e3r4t5y6u7'", "q1w2e3r4t5y6u7"),
    "address": ("https://mina:pa55-w0rd-of-mina@data.example.com/kr", "pa55-w0rd-of-mina"),
    "path": ("/data/https:/mina:pa55-w0rd-in-a-path@data.example.com/kr", "pa55-w0rd-in-a-path"),
    "token_address": ("git+https://x4mpl3t0k3nwithmanyletters@git.example.com/a", "x4mpl3t0k3nwithmanyletters"),
    "signed": ("https://s3.example.com/a?X-Amz-Signature=deadbeefcafe0123&part=1", "deadbeefcafe0123"),
    "sas": ("https://a.example.com/c?sv=2024&sig=s1gn4tur3%2Fofmine%3D", "s1gn4tur3%2Fofmine%3D"),
    "exported": ("export REGISTRY_TOKEN='t0k3n of registry'", "t0k3n of registry"),
    "bare": ("DB_PASSWORD=p4ssw0rd,with;rest", "p4ssw0rd,with"),
    "option": ("mount-data --password hunter2hunter2 /data", "hunter2hunter2"),
    "header": ("X-Api-Key: k3y-0f-th3-h34d3r", "k3y-0f-th3-h34d3r"),
    "json": ('{"client_secret": "cl13nt s3cr3t", "rate": 1}', "cl13nt s3cr3t"),
}
NAMED = {  # in a dictionary of settings, or NAME=value as a word of a command line
    "HF_TOKEN": "abcdefgh",
    "api_key": "12 words of it",
    "apiKey": "camel",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "password": 12345678,
    "credentials": ["one", "two"],
    "Authorization": "Digest x",
    "ssh_private_key": "lines",
    "submit.env.MY_SECRET": "dotted",
}
INNOCENT = {
    "special_tokens": ["<obj>", "</obj>"],
    "max_new_tokens": 256,
    "tokens_per_micro_batch": 16384,
    "pad_token": "<|endoftext|>",
    "revision": HEX,
    "commit": HEX,
    "weights_digest": HEX + HEX[:24],
    "SSH_KEY_PATH": "/home/mina/.ssh/id",
    "HF_TOKEN_PATH": "/home/mina/token",
    "token_accuracy": 0.5,
    "key": "image",
    "tags": ["disk-usage-of-the-nodes-in-rack-12", "한국어", "task-0123456789abcdefgh"],
    "command": "python run.py data.max_length=4096 model.revision=" + HEX,
    "path": f"/hub/models--a--b/snapshots/{HEX}/model.safetensors",
    "remote": "git@github.com:aiku/lit_vlm.git",
    "setup": ["module load cuda/12.4", "export HF_TOKEN=$HF_TOKEN", 'export KEY_FILE="$HOME/key"'],
    "message": "train.jsonl:1041: 2 image placeholders but 1 image; each '<image>' needs one.",
    "rate": 1e-5,
    "nothing": None,
    "on": True,
}
