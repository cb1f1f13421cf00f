#!/usr/bin/env bash
# VLMEvalKit (here its release on PyPI, ms-vlmeval) reads an answer that is exactly the text of an option, unless the text of another
# option is a part of it: of the options 10 and 100 it reads "10" and not "100". With `--judge exact_matching` the right answer is
# counted as wrong; with a judge, one more request is sent for it.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
# The rule needs only the standard library and a logger, so the packages that VLMEvalKit needs are left out.
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps ms-vlmeval==0.0.20 2>/dev/null
"$folder/env/bin/python" - <<'END'
import importlib.util
import logging
import sys
import types
from importlib.metadata import distribution, version

for name in ("vlmeval", "vlmeval.smp", "vlmeval.smp.log"):  # the package's own start imports everything
    sys.modules[name] = types.ModuleType(name)
sys.modules["vlmeval.smp.log"].get_logger = logging.getLogger
path = distribution("ms-vlmeval").locate_file("vlmeval/utils/matching_util.py")
spec = importlib.util.spec_from_file_location("matching_util", path)
rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)
print("ms-vlmeval", version("ms-vlmeval"))

cases = [
    (("10", "100", "5", "7"), "10", "A"),
    (("10", "100", "5", "7"), "100", False),
    (("blue", "blue and white", "red", "green"), "blue and white", False),
    (("서울", "서울역", "부산", "대구"), "서울역", False),
    (("1,000원", "11,000원", "5,500원", "7,000원"), "11,000원", False),
]
as_described = True
for options, answer, described in cases:
    read = rule.can_infer(answer, dict(zip("ABCD", options)))
    print(f"options {', '.join(options)}; answer {answer!r}: read {read or 'nothing'}")
    as_described &= read == described
sys.exit(0 if as_described else 1)
END
