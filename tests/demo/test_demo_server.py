"""The demo's application without a browser: its files, its settings, its check of pictures, and who may use it."""

import io
import re

import httpx2
import numpy as np
import pytest
from PIL import Image

from lit_vlm.config.parse import parse
from lit_vlm.demo import pages
from lit_vlm.types import UserError


def encode(image, image_format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **settings)
    return buffer.getvalue()


def test_the_page_loads_only_its_own_files_and_weighs_less_than_100_kb(start_demo):
    demo = start_demo()
    page = httpx2.get(demo.url)
    names = re.findall(r'(?:href|src)="(assets/[^"]+)"', page.text)
    assert len(names) == 4
    for match in re.findall(r'(?:href|src)="([^"]+)"', page.text):
        assert match.startswith("assets/") or match == "data:,"
    responses = [httpx2.get(demo.url + f"assets/{path.name}") for path in pages.ASSETS]
    assert all(response.status_code == 200 for response in responses)
    assert sum(len(response.content) for response in (page, *responses)) < 100_000
    assert not any(re.search(r"https?://", response.text) for response in (page, *responses))
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert httpx2.get(demo.url + "assets/pages.py").status_code == 404
    assert httpx2.get(demo.url + "assets/..%2fpages.py").status_code == 404


def test_the_settings_name_the_models_and_the_tokens_that_one_lacks(start_demo):
    demo = start_demo("a", "b", without_tokens=[1])
    first, second = httpx2.get(demo.url + "demo/settings").json()["models"]
    assert (first["name"], first["base"], first["missing_tokens"]) == ("tiny", "/v1", [])
    assert (second["name"], second["base"]) == ("other", "/second/v1")
    assert {"<gro>", "<ocr>", "<bbox>"} <= set(second["missing_tokens"])


def test_each_model_answers_at_its_own_address(start_demo):
    demo = start_demo("하나", "둘")
    answers = []
    for base, name in (("v1", "tiny"), ("second/v1", "other")):
        body = {"model": name, "messages": [{"role": "user", "content": "?"}]}
        found = httpx2.post(demo.url + base + "/chat/completions", json=body, timeout=60).json()
        answers.append(found["choices"][0]["message"]["content"])
    assert answers == ["하나", "둘"]


def test_a_picture_is_measured_upright_and_what_is_none_is_refused_with_the_reason(start_demo):
    url = start_demo(max_request_bytes=300_000).url + "demo/picture"
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = encode(Image.new("RGB", (40, 30)), "JPEG", exif=turned)
    assert httpx2.post(url, content=picture).json() == {"height": 40, "width": 30}
    noise = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)))
    large = encode(Image.new("1", (20_000, 10_000)))
    for data, status, reason in (
        (b"hello", 400, "is no JPEG, PNG"),
        (b"", 400, "is empty"),
        (b"<svg xmlns='x'/>", 400, "SVG"),
        (noise[: len(noise) // 2], 400, "truncated|ends early|incomplete|cannot be decoded"),
        (large, 400, "pixels"),
        (bytes(400_000), 413, "serve.max_request_mb"),
    ):
        response = httpx2.post(url, content=data, timeout=60)
        assert response.status_code == status and re.search(reason, response.json()["error"]["message"]), response.text


def test_a_page_of_another_site_cannot_use_the_server(start_demo):
    demo = start_demo()
    for site, expected in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"Sec-Fetch-Site": site}
        assert httpx2.get(demo.url + "demo/settings", headers=headers).status_code == expected
        assert httpx2.get(demo.url + "v1/models", headers=headers).status_code == expected
        assert httpx2.get(demo.url, headers=headers).status_code == 200  # a link to the page
    assert httpx2.get(demo.url, headers={"Host": "elsewhere.example"}).status_code == 400


def test_with_a_token_only_the_page_itself_is_shown_without_it(start_demo):
    demo = start_demo("a", "b", token="a token of this test 1")
    assert httpx2.get(demo.url).status_code == 200
    for path in ("demo/settings", "v1/models", "second/v1/models"):
        assert httpx2.get(demo.url + path).status_code == 401
    assert httpx2.post(demo.url + "demo/picture", content=b"x").status_code == 401
    allowed = {"Authorization": "Bearer a token of this test 1"}
    assert httpx2.get(demo.url + "demo/settings", headers=allowed).status_code == 200


def test_a_second_model_that_is_none_or_belongs_to_another_task_is_named(tmp_path):
    with pytest.raises(UserError, match=r"demo\.compare_with: is read with task=demo only"):
        parse(["task=serve", "init_from=a/b", "demo.compare_with=a/c"])
    from lit_vlm.config.model_folders import require_model_folders

    (tmp_path / "mine" / "hf").mkdir(parents=True)
    with pytest.raises(UserError, match=r"demo\.compare_with=.*no config\.json"):
        require_model_folders(parse(["task=demo", "init_from=a/b", f"demo.compare_with={tmp_path}/mine/hf"]))
