#!/usr/bin/env bash
# The pictures of an offline run's tables lie in the home folder and not in the run's. With another home `wandb sync` exits 0,
# says "Finished", sends none of them, leaves the artifact pending, and marks the run as synced, so that a second try skips it.
# The server is a stub on the loopback interface. Exit 0: it is so; 1: it changed.
set -eu
FOLDER=$(mktemp -d); SERVER=""
trap '[ -z "$SERVER" ] || kill "$SERVER" 2>/dev/null; chmod -R u+w "$FOLDER"; rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check wandb==0.31.0 pillow==13.0.0
.venv/bin/python -c 'import wandb; print("wandb", wandb.__version__)'

cat > server.py <<'END'
"""What wandb asks of a server for runs, rows, files and artifacts, on the loopback interface; state.json says what arrived."""
import gzip, json, re, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

runs, artifacts, stored, lock = {}, {}, [], threading.RLock()
ENTITY = {"id": "e", "name": "me"}

def run_of(name):
    return runs.setdefault(name, {"history": [], "starts": 0, "exit": None})

def project(name):
    return {"id": "p", "name": name, "entity": ENTITY}

def answer(name, v):
    url = f"http://127.0.0.1:{server.server_address[1]}/storage"
    upload = {"uploadUrl": f"{url}/manifest", "uploadHeaders": []}
    if name in ("Viewer", "GetViewer", "GetDefaultEntity"):
        return {"viewer": {**ENTITY, "entity": "me", "username": "me", "email": "me@example.com", "admin": False, "flags": "{}",
                "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": [{"node": {"name": "me"}}]}}}
    if name == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    if name == "ServerInfo":
        return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}}
    if name == "UpsertBucket":
        run = run_of(v.get("name") or v.get("id"))
        run["starts"] += 1
        bucket = {"id": v.get("name"), "name": v.get("name"), "displayName": "r", "description": None, "config": "{}",
                  "sweepName": None, "project": project(v.get("project")), "historyLineCount": len(run["history"])}
        return {"upsertBucket": {"inserted": run["starts"] == 1, "bucket": bucket}}
    if name == "RunResumeStatus":
        return {"model": {**project(v.get("project")), "bucket": None}}
    if name == "CreateRunFiles":
        files = [{"name": n, "uploadUrl": f"{url}/{n}"} for n in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}
    if name == "CreateArtifact":
        number = f"a{len(artifacts)}"
        artifacts[number] = "PENDING"
        return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}}}
    if name == "CreateArtifactManifest":
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": {"id": "m", **upload}}}}
    if name == "UpdateArtifactManifest":
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": {"id": "m", **upload}}}}
    if name == "CreateArtifactFiles":
        edges = [{"node": {"storagePath": f["name"], "uploadUrl": f"{url}/artifact/{f['name']}", "uploadHeaders": [],
                  "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}} for f in v["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": edges}}}
    if name == "CommitArtifact":
        artifacts[v["artifactID"]] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": ""}}}
    return {"XXHashDigestsEnabled": {"entity": None}, "FetchArtifactDigestAlgorithm": {"project": None},
            "RunStoppedStatus": {"project": {"run": {"stopped": False}}}}.get(name, {})

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def reply(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with lock:
            said = {}
            if self.path.startswith("/storage/"):
                stored.append(self.path.removeprefix("/storage/").partition("?")[0])
            elif self.path.endswith("/file_stream"):
                run, message = run_of(self.path.split("/")[-2]), json.loads(body or b"{}")
                for name, chunk in (message.get("files") or {}).items():
                    if name == "wandb-history.jsonl":
                        run["history"][chunk["offset"]:] = chunk["content"]
                if message.get("complete"):
                    run["exit"] = message.get("exitcode", 0)
            elif self.path == "/graphql":
                request = json.loads(body)
                named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                name = request.get("operationName") or (named[1] if named else "")
                said = {"data": answer(name, request.get("variables") or {})}
            open("state.json", "w").write(json.dumps({"runs": {n: {"rows": len(r["history"]), "exit": r["exit"]}
                for n, r in runs.items()}, "artifacts": list(artifacts.values()), "stored": stored}))
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    do_GET = do_POST = do_PUT = reply
    def log_message(self, *words):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
open("port", "w").write(str(server.server_address[1]))
server.serve_forever()
END
.venv/bin/python server.py >/dev/null 2>&1 & SERVER=$!
while [ ! -s port ]; do sleep 0.1; done
export WANDB_BASE_URL="http://127.0.0.1:$(cat port)" WANDB_API_KEY=$(printf '%040d' 0) WANDB_ERROR_REPORTING=false NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
unset WANDB_MODE WANDB_DIR WANDB_DATA_DIR WANDB_CACHE_DIR

mkdir run node login
cat > log.py <<'END'
import wandb
from PIL import Image
run = wandb.init(project="p", mode="offline", dir="run", settings=wandb.Settings(silent=True, console="off"))
cells = [[number, wandb.Image(Image.new("RGB", (8 + number, 8)))] for number in range(8)]
run.log({"table": wandb.Table(columns=["number", "picture"], data=cells)})
run.finish()
END
HOME="$FOLDER/node" XDG_DATA_HOME= .venv/bin/python log.py
rm -rf node  # the node, or the container, is gone
PICTURES=$(find run -name '*.png' | wc -l)
HOME="$FOLDER/login" .venv/bin/wandb sync run/wandb/offline-run-* >first 2>&1 && FIRST=$? || FIRST=$?
HOME="$FOLDER/login" .venv/bin/wandb sync run/wandb/ >second 2>&1 && SECOND=$? || SECOND=$?
SENT=$(.venv/bin/python -c 'import json; print(sum(name.endswith(".png") for name in json.load(open("state.json"))["stored"]))')
STATES=$(.venv/bin/python -c 'import json; print(*json.load(open("state.json"))["artifacts"])')
echo "pictures in the run's folder: $PICTURES of 8; sync: exit $FIRST, '$(grep -o 'Finished' first | head -1)'; arrived: $SENT of 8; artifact: $STATES"
echo "a second sync: exit $SECOND, '$(grep -o 'Skipped.*run(s)' second | head -1)'"
[ "$PICTURES" = 0 ] && [ "$FIRST" = 0 ] && grep -q Finished first && [ "$SENT" = 0 ] && [ "$STATES" = PENDING ] && grep -q 'Skipped 1 synced' second
