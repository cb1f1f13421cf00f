"""The demo's page in a real browser: Debian's Chromium, driven by Playwright. Without Chromium these tests are skipped."""

import base64
import io
import random
import socket

import numpy as np
import pytest
from PIL import Image, ImageDraw
from waiting import until

from lit_vlm.data.markup import format_box, parse_markup
from lit_vlm.evaluation.task_pack.box_scores import CONTROL_TOKENS, read_mentions
from lit_vlm.types import Box, ControlToken

pytestmark = pytest.mark.slow

WIDTH, HEIGHT = 200, 120  # of the picture, in pixels
BOXED = "<obj>빨간 원</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>과 <obj>별</obj><bbox>0.6, 0.1, 0.9, 0.4<delim>0.6, 0.5, 0.9, 0.95</bbox>이 있어요."
HTML = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>굵게</b>"


def make_png(colour="#d8d8d8", size=(WIDTH, HEIGHT)):
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).ellipse((20, 24, 100, 72), fill="#c02020")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "shapes.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def add_picture(page, picture=None):
    number = page.locator("#pending .thumbnail").count()
    page.set_input_files("#file", [picture or make_png()])
    until(lambda: page.locator("#pending .thumbnail").count() > number)


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")
    wait_for_answers(page)


def wait_for_answers(page):
    # A stream ends a little after its answer; the page sends no question before that.
    until(
        lambda: page.evaluate(
            "document.querySelector('.answer') && !document.querySelector('.busy') && !document.querySelector('#send').disabled"
        )
    )


def read_requests(page):
    """Record the bodies of the requests for answers that the page sends from now on."""
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if "completions" in request.url else None)
    return bodies


def get_questions(bodies):
    return [[part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text"] for body in bodies]


def find_coloured(page, selector, colour, tolerance=12):
    """Find the pixels of a colour in a screenshot of an element: left, top, right, bottom as fractions of it."""
    pixels = np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)
    ys, xs = np.nonzero((abs(pixels - colour) <= tolerance).all(axis=2))
    height, width = pixels.shape[:2]
    return xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height, (width, height)


def test_an_uploaded_picture_is_asked_about_and_its_boxes_are_drawn_at_the_right_pixels(start_demo, open_page):
    page = open_page(start_demo("<char>7</char><bbox>0.25, 0.3, 0.75, 0.8</bbox>"))
    bodies = read_requests(page)
    add_picture(page)
    ask(page, "무엇이 보이나요?")
    (parts,) = [body["messages"][-1]["content"] for body in bodies]
    data = base64.b64decode(parts[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert data == make_png()["buffer"] and parts[1] == {"type": "text", "text": "무엇이 보이나요?"}
    page.evaluate(
        "document.querySelector('.box span').hidden = true; document.querySelector('.box').style.boxShadow = 'none'"
    )
    *edges, (width, height) = find_coloured(page, "#boxes", (0xE1, 0x1D, 0x48))
    assert width / height == pytest.approx(WIDTH / HEIGHT, rel=0.01)  # the picture keeps its shape
    for found, expected, pixels in zip(edges, (0.25, 0.3, 0.75, 0.8), (width, height) * 2, strict=True):
        assert abs(found - expected) * pixels <= 1.5, (edges, width, height)  # a pixel of the browser's rounding


def test_every_box_of_a_phrase_is_drawn_and_hovering_links_phrase_and_boxes(start_demo, open_page):
    page = open_page(start_demo(BOXED))
    add_picture(page)
    ask(page, "무엇이 어디에 있나요?")
    assert page.locator("#boxes .box").count() == 3
    assert page.locator(".answer .text").inner_text() == "빨간 원과 별이 있어요."
    page.hover(".answer .phrase >> text=별")
    assert page.locator("#boxes .box.lit").count() == 2
    page.locator("#boxes .box").first.hover()
    assert page.locator(".answer .phrase.lit").all_inner_texts() == ["빨간 원"]
    items = page.locator("#readings li").all_inner_texts()
    assert [" ".join(item.split()) for item in items] == [
        "빨간 원 0.1, 0.2, 0.5, 0.6",
        "별 0.6, 0.1, 0.9, 0.4 · 0.6, 0.5, 0.9, 0.95",
    ]


def test_boxes_are_drawn_while_the_answer_streams(start_demo, open_page):
    page = open_page(start_demo("<obj>원</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>" + "가" * 900, ends=False))
    add_picture(page)
    page.fill("#question", "?")
    page.press("#question", "Enter")
    page.wait_for_selector("#boxes .box")
    assert page.locator(".answer .busy").count() == 1
    page.press("body", "Escape")
    page.wait_for_selector(".answer .note")
    assert page.locator(".answer .note").inner_text() == "Stopped." and page.locator("#boxes .box").count() == 1


def test_a_drawn_box_is_in_the_question_with_three_decimals(start_demo, open_page):
    page = open_page(start_demo("파란색"), language="ko-KR")
    bodies = read_requests(page)
    add_picture(page)
    place = page.locator("#boxes").bounding_box()
    x1, y1, x2, y2 = (round(place["x"] + place["width"] * 0.123), round(place["y"] + place["height"] * 0.4),
                      round(place["x"] + place["width"] * 0.71), round(place["y"] + place["height"] * 0.777))  # fmt: skip
    page.mouse.move(x2, y1)
    page.mouse.down()
    page.mouse.move((x1 + x2) / 2, (y1 + y2) / 2)
    page.mouse.move(x1, y2)
    page.mouse.up()
    assert page.locator("#modes input:checked").input_value() == "ref"
    page.fill("#question", "□는 무슨 색인가요?")
    page.press("#question", "Enter")
    wait_for_answers(page)
    corners = [(x1 - place["x"]) / place["width"], (y1 - place["y"]) / place["height"]]
    corners += [(x2 - place["x"]) / place["width"], (y2 - place["y"]) / place["height"]]
    ((text,),) = get_questions(bodies)
    assert text == f"<obj>이 물체</obj><bbox>{format_box(Box(*corners))}</bbox>는 무슨 색인가요?"
    assert sum(isinstance(piece, ControlToken) for piece in parse_markup(text)) == 4  # the server makes them tokens
    assert page.locator("#boxes .asked").count() == 0  # the next question has no box


def test_the_buttons_send_the_control_tokens_of_training(start_demo, open_page):
    page = open_page(start_demo("네"))
    bodies = read_requests(page)
    add_picture(page)
    for mode, text in (("ocr", ""), ("gro", "Find the star."), ("gro", ""), ("ask", "Why?")):
        page.locator(f"#modes input[value={mode}]").check()
        ask(page, text)
    assert get_questions(bodies) == [["<ocr>"], ["<gro>\nFind the star."], ["<gro>\nWhat is where?"], ["Why?"]]
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant"] * 3 + ["user"]
    assert (
        sum(
            part["type"] == "image_url"
            for message in bodies[-1]["messages"]
            for part in message["content"]
            if isinstance(part, dict)
        )
        == 1
    )


def test_a_model_without_the_tokens_disables_the_buttons_and_says_so(start_demo, open_page):
    page = open_page(start_demo("a", "b", without_tokens=[1]))
    for mode in ("ocr", "gro", "ref"):
        assert page.locator(f"#modes input[value={mode}]").is_disabled()
    assert page.locator("#modes input[value=ask]").is_enabled()
    assert page.locator("#lacking").inner_text().startswith("other has no <gro> <ocr>")
    add_picture(page)
    place = page.locator("#boxes").bounding_box()
    page.mouse.move(place["x"] + 5, place["y"] + 5)
    page.mouse.down()
    page.mouse.move(place["x"] + 60, place["y"] + 60)
    page.mouse.up()
    assert page.locator("#boxes .asked").count() == 0
    ask(page, "text alone works")
    assert page.locator(".answer .text").all_inner_texts() == ["a", "b"]


def test_two_checkpoints_answer_one_question_side_by_side(start_demo, open_page):
    demo = start_demo(BOXED, "<obj>원</obj><bbox>0.2, 0.2, 0.6, 0.6</bbox>")
    page = open_page(demo)
    bodies = read_requests(page)
    add_picture(page)
    ask(page, "처음?")
    ask(page, "다음?")
    boxes = page.locator(".turn").last.locator(".answer")
    left, right = (boxes.nth(number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert boxes.nth(0).locator(".who").inner_text() == "tiny" and boxes.nth(1).locator(".who").inner_text() == "other"
    assert page.locator("#boxes .box.model-0").count() == 3 and page.locator("#boxes .box.model-1").count() == 1
    history = {body["model"]: body["messages"][1]["content"] for body in bodies[2:]}  # each remembers its own answer
    assert history == {"tiny": BOXED, "other": "<obj>원</obj><bbox>0.2, 0.2, 0.6, 0.6</bbox>"}


def test_markup_of_an_answer_stays_text(start_demo, open_page):
    page = open_page(start_demo(HTML + "<obj><i>x</i></obj><bbox>0.1, 0.1, 0.2, 0.2</bbox>"))
    add_picture(page)
    ask(page, "<b>?</b>")
    assert page.locator(".answer .text").inner_text() == HTML + "<i>x</i>"
    assert page.locator(".asked-text").inner_text() == "<b>?</b>"
    assert page.locator("#log :is(b, i, script), #boxes :is(b, i), #readings :is(b, i)").count() == 0
    assert page.title() == "Ask a picture"
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    )
    assert refused == "TypeError"  # Trusted Types: the browser itself refuses to make HTML of a text


def test_korean_is_composed_and_its_enter_does_not_send(start_demo, open_page):
    page = open_page(start_demo("네"), language="ko-KR")
    bodies = read_requests(page)
    session = page.context.new_cdp_session(page)
    page.focus("#question")
    for text in ("ㅎ", "하", "한"):
        session.send("Input.imeSetComposition", {"text": text, "selectionStart": 1, "selectionEnd": 1})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    session.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    assert page.input_value("#question") == "한" and not bodies
    session.send("Input.insertText", {"text": "한글"})
    page.press("#question", "Enter")
    wait_for_answers(page)
    assert get_questions(bodies) == [["한글"]] and page.input_value("#question") == ""


def test_a_dead_server_says_so_and_the_page_goes_on_when_it_is_back(start_demo, open_page):
    from served import stop_servers

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    demo = start_demo("네", port=port)
    page = open_page(demo)
    ask(page, "하나?")
    stop_servers(demo.running)
    page.fill("#question", "둘?")
    page.press("#question", "Enter")
    page.wait_for_selector(".answer .error")
    assert "does not answer" in page.locator(".answer .error").inner_text()
    page.wait_for_selector("#banner:not([hidden])")
    assert page.locator("#banner").inner_text().startswith("The server does not answer.")
    start_demo("다시", port=port)
    page.wait_for_selector("#banner", state="hidden")
    page.click("text=Ask again")
    wait_for_answers(page)
    assert page.locator(".answer .text").all_inner_texts() == ["네", "다시"]


def test_a_server_that_dies_in_the_middle_leaves_the_answer_and_says_that_it_is_incomplete(start_demo, open_page):
    demo = start_demo("가" * 1200, ends=False)
    page = open_page(demo)
    page.route("**/chat/completions", break_stream)
    page.fill("#question", "?")
    page.press("#question", "Enter")
    page.wait_for_selector(".answer .error")
    assert page.locator(".answer .text").inner_text() == "반쪽"
    assert (
        page.locator(".answer .error").inner_text() == "The connection ended in the middle: this answer is incomplete."
    )


def break_stream(route):
    event = '{"choices": [{"index": 0, "delta": {"content": "반쪽"}, "finish_reason": null}]}'
    route.fulfill(status=200, content_type="text/event-stream", body=f"data: {event}\n\ndata: {{")


def test_a_closed_tab_ends_its_generation_and_not_that_of_another_tab(start_demo, open_page):
    demo = start_demo("가" * 1400, ends=False)
    pages = [open_page(demo) for _ in range(2)]
    for page in pages:
        page.evaluate("document.getElementById('max-tokens').value = 1400")
        page.fill("#question", "?")
        page.press("#question", "Enter")
        page.wait_for_selector(".answer .busy")
    worker = demo.services[0].worker
    until(lambda: worker.num_jobs == 2)
    pages[0].close()
    until(lambda: worker.num_jobs == 1)
    assert pages[1].locator(".answer .busy").count() == 1
    pages[1].close()
    until(lambda: worker.num_jobs == 0)


def test_pictures_are_dropped_and_pasted_and_what_is_none_says_why(start_demo, open_page):
    page = open_page(start_demo("네"))
    bodies = read_requests(page)
    data = base64.b64encode(make_png()["buffer"]).decode()
    make_transfer = """([data, name, type]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type }));
        return transfer;
    }"""
    transfer = page.evaluate_handle(make_transfer, [data, "a.png", "image/png"])
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#pending .thumbnail")
    page.evaluate(
        "transfer => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer }))", transfer
    )
    until(lambda: page.locator("#pending .thumbnail").count() == 2)
    page.set_input_files("#file", [{"name": "no.png", "mimeType": "image/png", "buffer": b"hello"}])
    page.wait_for_selector("#banner:not([hidden])")
    assert "no.png: its image is no JPEG, PNG" in page.locator("#banner").inner_text()
    page.locator("#pending .remove").first.click()
    ask(page, "?")
    add_picture(page, make_png("#88aacc"))
    ask(page, "?")
    assert [sum(part["type"] == "image_url" for part in body["messages"][-1]["content"]) for body in bodies] == [1, 1]


def test_the_keyboard_alone_adds_a_box_asks_and_changes_language(start_demo, open_page):
    page = open_page(start_demo("빨간색"))
    bodies = read_requests(page)
    add_picture(page)  # the system's file dialog is outside of the page; its button is reached below
    focused = lambda: page.evaluate("document.activeElement.id || document.activeElement.value")

    def press_until(key, target, most=40):
        for _ in range(most):
            if focused() == target:
                return
            page.keyboard.press(key)
        raise AssertionError(f"{target} is not reached with {key}")

    press_until("Tab", "language")
    page.keyboard.press("Enter")
    assert page.locator("html").get_attribute("lang") == "ko" and page.title() == "그림에 묻기"
    page.keyboard.press("Shift+Tab")
    press_until("Tab", "log")
    page.keyboard.press("Tab")
    assert focused() == "ask"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#modes input:checked").input_value() == "ref"
    for field, value in (("x1", "0.1"), ("y1", "0.2"), ("x2", "0.5"), ("y2", "0.625")):
        press_until("Tab", field)
        page.keyboard.type(value)
    press_until("Tab", "question")
    page.keyboard.type("무슨 색?")
    page.keyboard.press("Enter")
    wait_for_answers(page)
    assert get_questions(bodies) == [["<obj>이 물체</obj><bbox>0.1, 0.2, 0.5, 0.625</bbox> 무슨 색?"]]
    press_until("Tab", "file")
    press_until("Tab", "send")


def test_the_page_has_no_accessibility_error_in_light_and_dark_on_a_desktop_and_a_phone(start_demo, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    demo = start_demo(BOXED, "<char>7</char><bbox>0.1, 0.1, 0.2, 0.2</bbox>", without_tokens=())
    for scheme, width, language in (("light", 1280, "en-US"), ("dark", 390, "ko-KR"), ("dark", 1280, "en-US")):
        settings = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "bypass_csp": True}
        page = open_page(demo, language=language, **settings)
        violations = axe.run(page).response["violations"]
        add_picture(page)
        page.locator("#modes input[value=gro]").check()
        ask(page, "Find it.")
        add_picture(page)
        page.locator("#modes input[value=ref]").check()
        violations += axe.run(page).response["violations"]
        found = [(each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in violations]
        assert found == [], (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is cut at this width


def test_the_page_reads_the_boxes_that_the_package_reads(start_demo, open_page):
    page = open_page(start_demo("네"))
    rng = random.Random(0)
    numbers = (
        "0.1, 0.2, 0.5, 0.6",
        "0.5, 0.1, 0.2, 0.9",
        "1e-1,.2,3.,4",
        "nan, 0, 1, 1",
        "inf,0,1,1",
        "1_0, 0, 20, 1",
        "0.1, 0.2",
    )
    atoms = [*CONTROL_TOKENS, *numbers, "-0.5, 0, 1.5, 1", " ", "\n", "원", "<", "a<b"]
    good = [
        "<obj>원</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>",
        "<char> 7 </char> <bbox>0,0,1,1<delim>0.2, 0.2, 0.4, 0.4</bbox>",
    ]
    texts = ["".join(rng.choice(atoms + good) for _ in range(rng.randint(1, 12))) for _ in range(3000)]
    script = """async (texts) => {
        const { parseAnswer } = await import(new URL("assets/markup.js", location));
        const isMention = (piece) => piece.type === "mention";
        return texts.map((text) => parseAnswer(text).filter(isMention).map((piece) => [piece.tag, piece.phrase, piece.boxes]));
    }"""
    found = page.evaluate(script, texts)
    expected = [
        [[tag, phrase, [list(box) for box in boxes]] for tag, phrase, boxes in read_mentions(text)] for text in texts
    ]
    assert sum(map(len, expected)) > 1000
    assert found == expected
    boxes = [sorted(rng.random() for _ in range(2)) + sorted(rng.random() for _ in range(2)) for _ in range(500)]
    boxes += [[0, 0, 1, 1], [0.5, 0.25, 0.75, 0.9996]]
    script = "async (boxes) => { const { formatBox } = await import(new URL('assets/markup.js', location)); return boxes.map(formatBox); }"
    assert page.evaluate(script, boxes) == [", ".join(str(round(float(value), 3)) for value in box) for box in boxes]


def test_a_token_is_asked_for_once(start_demo, open_page):
    page = open_page(start_demo("네", token="a token of this test 1"))
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.wait_for_selector("#banner:not([hidden])")
    assert page.locator("#banner").inner_text() == "The server does not accept this token."
    page.fill("#token", "a token of this test 1")
    page.press("#token", "Enter")
    page.wait_for_selector("#main:not([hidden])")
    ask(page, "?")
    page.reload()
    page.wait_for_selector("#main:not([hidden])")


def test_a_conversation_larger_than_the_server_takes_is_named_before_it_is_sent(start_demo, open_page):
    page = open_page(start_demo("네", max_request_bytes=100_000))
    bodies = read_requests(page)
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)).save(noise, "PNG")
    add_picture(page, {"name": "noise.png", "mimeType": "image/png", "buffer": noise.getvalue()})
    page.fill("#question", "?")
    page.press("#question", "Enter")
    page.wait_for_selector(".answer .error")
    assert "the server takes 0.1 MB (serve.max_request_mb)" in page.locator(".answer .error").inner_text()
    assert not bodies
