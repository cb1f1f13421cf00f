#!/usr/bin/env bash
# datatrove removes near duplicates by MinHash over n-grams of 5 words. A text of fewer words has no n-gram: it gets no signature, takes
# part in no comparison, and is always kept, without a count in the statistics. So 100 equal captions of 4 words all stay, while of 100
# equal captions of 9 words one stays. Alternative texts of the web are often that short. Remove equal texts before (its own
# exact deduplication works on lines or paragraphs), or set `n_grams=1` or `2` in `MinhashConfig`, which this script shows as well.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check datatrove==0.10.1 spacy==3.8.18 regex==2026.11.19 fasteners==0.20 \
  tokenizers==0.23.3 xxhash==3.5.0 orjson==3.11.9 nltk==3.9.2 2>/dev/null
cat > "$folder/deduplicate.py" <<'END'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

SHORT, LONG = "a red dog runs", "a small red dog runs over the green grass"


def count_kept(root, **settings):
    """Deduplicate 100 copies of each caption; return how many of each are kept."""
    (root / "in").mkdir(parents=True)
    rows = [{"id": str(number), "text": text} for number, text in enumerate([SHORT] * 100 + [LONG] * 100)]
    (root / "in" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, place = MinhashConfig(**settings), {name: str(root / name) for name in ("in", "sig", "buckets", "remove", "out")}
    steps = [
        [JsonlReader(place["in"]), MinhashDedupSignature(output_folder=place["sig"], config=config)],
        [MinhashDedupBuckets(input_folder=place["sig"], output_folder=place["buckets"], config=config)],
        [MinhashDedupCluster(input_folder=place["buckets"], output_folder=place["remove"], config=config)],
        [
            JsonlReader(place["in"]),
            MinhashDedupFilter(input_folder=place["remove"]),
            JsonlWriter(place["out"], compression=None),
        ],
    ]
    for number, step in enumerate(steps):
        tasks = config.num_buckets if number == 1 else 1
        LocalPipelineExecutor(step, tasks=tasks, workers=1, logging_dir=str(root / f"log{number}")).run()
    kept = [json.loads(line)["text"] for path in (root / "out").iterdir() for line in path.read_text().splitlines()]
    return {text: kept.count(text) for text in (SHORT, LONG)}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found = {"as shipped, n_grams=5": count_kept(root / "five"), "n_grams=2": count_kept(root / "two", n_grams=2)}
    print("datatrove", version("datatrove"))
    for name, kept in found.items():
        print(f"{name}: kept {kept[SHORT]} of 100 copies of {SHORT!r}, {kept[LONG]} of 100 of {LONG!r}")
    described = [{SHORT: 100, LONG: 1}, {SHORT: 1, LONG: 1}]
    sys.exit(0 if list(found.values()) == described else 1)
END
PATH="$folder/env/bin:$PATH" "$folder/env/bin/python" "$folder/deduplicate.py" "$folder/work" 2>/dev/null
