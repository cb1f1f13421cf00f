#!/usr/bin/env bash
# `wandb sync` of an offline run that is still under way exits 0, sends what is there as a run that failed, and marks it as synced.
# After the end of the run a second sync skips it, so that its last rows never arrive; with --include-synced it adds all rows
# once more, so that the server has the first part twice.
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

mkdir run
cat > log.py <<'END'
import os, time, wandb
run = wandb.init(project="p", mode="offline", dir="run", settings=wandb.Settings(silent=True, console="off"))
for step in range(3000):
    run.log({"loss": 1 / (step + 1)})
open("half", "w").close()
while not os.path.exists("go"):
    time.sleep(0.1)
for step in range(6):
    run.log({"loss": 1})
run.finish()
END
export HOME="$FOLDER"
.venv/bin/python log.py & RUN=$!
while [ ! -e half ]; do sleep 0.1; done
sleep 5
rows() { .venv/bin/python -c 'import json; (run,) = json.load(open("state.json"))["runs"].values(); print(run["rows"], run["exit"])'; }
.venv/bin/wandb sync run/wandb/offline-run-* >first 2>&1 && FIRST=$? || FIRST=$?
HALF=$(rows)
touch go; wait $RUN
.venv/bin/wandb sync run/wandb/ >skipped 2>&1 || true
SKIPPED=$(rows)
.venv/bin/wandb sync --include-synced run/wandb/offline-run-* >second 2>&1 && SECOND=$? || SECOND=$?
WHOLE=$(rows)
echo "sync while it runs: exit $FIRST, rows and exit code at the server: $HALF"
echo "after its end: $SKIPPED, '$(grep -o 'Skipped.*run(s)' skipped | head -1)'; with --include-synced: exit $SECOND, $WHOLE; logged: 3006"
[ "$FIRST" = 0 ] && [ "$HALF" = "3000 1" ] && [ "$SKIPPED" = "$HALF" ] && [ "${WHOLE% *}" -gt 3006 ]
