"""lmms-eval's own judges find an endpoint by the variables that this project makes. `make test-outside` runs this."""

import subprocess

import pytest
from evaluation.chat_server import ChatServer, complete
from harness_runs import LMMS_EVAL, make_environment

from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.evaluation.endpoint import make_lmms_eval_variables

pytestmark = [
    pytest.mark.outside,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not LMMS_EVAL.is_file(), reason="no lmms-eval; make test-outside puts it there"),
]
BASE_ADDRESS = """
from lmms_eval.llm_judge import Request, ServerConfig, get_server
import os
server = get_server(os.environ["API_TYPE"], ServerConfig(model_name=os.environ["MODEL_VERSION"]))
print(server.evaluate(Request(messages=[{"role": "user", "content": "?"}])).content)
"""
FULL_ADDRESS = """
from lmms_eval.tasks.mmbench.ko_utils import mmbench_evaluator
print(mmbench_evaluator.get_chat_response("?"))
"""


@pytest.mark.parametrize(("has_full_url", "code"), [(False, BASE_ADDRESS), (True, FULL_ADDRESS)])
def test_a_judge_of_lmms_eval_asks_the_endpoint_and_its_model(has_full_url, code):
    with ChatServer(lambda number, body: complete("8 9")) as server:
        settings = EndpointConfig(endpoint=server.url, model="mine")
        variables = make_lmms_eval_variables(settings, "the-key", has_full_url=has_full_url)
        environment = make_environment(LMMS_EVAL) | variables
        result = subprocess.run([LMMS_EVAL, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip().endswith("8 9"), result.stderr[-2000:]
        assert server.bodies[0]["model"] == "mine" and server.headers["Authorization"] == "Bearer the-key"
