"""The page, driven by headless Chromium: what it plays, draws, says and sends."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Browser, Page, expect

from aloud.live_speech import LiveSpeech
from aloud.server.settings import Settings
from interop.driving import (
    CLOCK,
    CONTRAST,
    EAR,
    FADE,
    LEAD,
    SENDER,
    Visit,
    assert_heard,
    bars,
    expected,
    figure,
    gaps,
    heard_by,
    sample,
    seeded,
    send,
    speak,
    starts_of,
    wait_until_over,
    without_pauses,
)
from server.running import FRAME, LONG, RATE, Running, is_idle, pcm, serving, wait_until, wav

Visitor = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, served: Running) -> Iterator[Visitor]:
    """Open the page; in the end, the browser has complained of nothing but what was `refused`, and all is idle."""
    visits: list[tuple[Visit, tuple[str, ...]]] = []

    def visit(script: str = "", *, running: Running = served, refused: tuple[str, ...] = (), **arguments: Any) -> Page:
        visit = Visit(browser, running.url, script, **arguments)
        visits.append((visit, refused))
        return visit.page

    yield visit
    for visited, refused in visits:
        visited.browsing.close()
        assert len(visited.complaints) == len(refused), visited.complaints
        assert all(reason in complaint for reason, complaint in zip(refused, visited.complaints, strict=True))
        assert {host for host in visited.hosts if host} <= {visited.host}  # a blob has none
    with served.client() as client:
        for voice in client.get("/v1/audio/voices").json()["voices"]:
            client.delete(f"/v1/audio/voices/{voice['name']}")
    wait_until(lambda: is_idle(served.engine))


def test_what_is_heard_is_what_the_server_says(visit: Visitor, served: Running, seed: int) -> None:
    page = visit(EAR)
    asked = seeded(page, seed=seed, max_seconds=1.2)
    page.get_by_label("Voice").select_option("nova")
    speak(page, "Good morning to you.")
    wait_until_over(page)
    (body,) = asked
    assert (body["input"], body["voice"], body["response_format"]) == ("Good morning to you.", "nova", "pcm")
    samples = pcm(served.speech(**body).content)
    assert np.abs(samples).max() > 0.01
    starts, heard = starts_of(page), heard_by(page)
    assert_heard(heard, expected(starts, samples, len(heard)))
    assert len(heard) >= sum(starts[-1])
    assert gaps(starts) == int(figure(page, "Pauses"))

    requests = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.toJSON())")
    (request,) = (request for request in requests if request["name"].endswith("speech"))
    first = request["responseStart"] - request["startTime"]
    assert first - 20 <= int(figure(page, "First audio").removesuffix(" ms")) <= first + 500
    assert figure(page, "Audio") == f"{len(samples) / RATE:.1f} s"
    factor = len(samples) / RATE / (request["duration"] / 1000)
    assert float(figure(page, "Real time").removesuffix(" ×")) == pytest.approx(factor, rel=0.4, abs=0.1)
    assert bars(page)[: len(samples) // 750].min() > 0.05


def test_chunks_follow_one_another_without_a_gap(visit: Visitor, seed: int) -> None:
    page = visit(CLOCK + SENDER)
    speak(page)
    page.wait_for_function("window.controller")
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, 2 * 20_000).astype(np.uint8)  # 20,000 samples, cut anywhere, in half samples too
    cuts = sorted(random.choice(np.arange(1, len(data)), 30, replace=False))
    sent = 0
    for part in np.split(data, cuts):
        page.evaluate("bytes => send(bytes)", part.tolist())
        sent += len(part)
        page.wait_for_function("count => starts.reduce((sum, [, length]) => sum + length, 0) === count", arg=sent // 2)
        # Almost all has been played: what comes now comes just in time.
        page.evaluate("if (starts.length) device.currentTime = (starts.at(-1)[0] + starts.at(-1)[1] - 600) / 24000")
    exact = page.evaluate("starts")
    starts = [(round(start), length) for start, length in exact]
    np.testing.assert_allclose(starts, exact, rtol=0, atol=1e-6)  # whole samples: nothing is interpolated
    assert starts[0][0] == LEAD
    assert gaps(starts) == 0
    assert figure(page, "Pauses") == "0"

    # One that comes too late waits twice as long as the first did, so that the next is less likely to.
    end = sum(starts[-1])
    page.evaluate(f"device.currentTime = {end + 500} / 24000")
    send(page, np.zeros(FRAME))
    page.wait_for_function("count => starts.length === count", arg=len(starts) + 1)
    late, _ = page.evaluate("starts.at(-1)")
    assert end + 500 + 2 * LEAD <= round(late) <= end + 501 + 2 * LEAD
    expect(page.locator("dd").last).to_have_text("1")
    page.get_by_role("button", name="Stop", exact=True).click()


def test_the_waveform_shows_how_loud_it_was(visit: Visitor) -> None:
    page = visit(CLOCK + SENDER)
    assert bars(page).max() < 0.05
    speak(page)
    page.wait_for_function("window.controller")
    page.evaluate("device.currentTime = 100")
    for loudness, seconds in ((0, 1), (1 / 2, 1), (0, 2), (1 / 32, 2)):  # past the first four, and twice as coarse
        send(page, np.full(seconds * RATE, loudness))
    expect(page.get_by_text("6.0 s")).to_be_visible()
    page.evaluate("new Promise(requestAnimationFrame)")
    page.evaluate("new Promise(requestAnimationFrame)")
    heights = bars(page)
    second = 16  # bars
    assert heights[:second].max() < 0.05
    np.testing.assert_allclose(heights[second : 2 * second], 0.5**0.5, atol=0.03)
    assert heights[2 * second : 4 * second].max() < 0.05
    np.testing.assert_allclose(heights[4 * second : 6 * second], (1 / 32) ** 0.5, atol=0.03)
    assert heights[6 * second :].max() < 0.05
    # What is ten seconds ahead only keeps pace, and no longer says how fast the server is.
    factor = figure(page, "Real time")
    send(page, np.zeros(4 * RATE))
    expect(page.get_by_text("10.0 s")).to_be_visible()
    assert figure(page, "Real time") == factor
    heights = np.array([max(pair) for pair in heights.reshape(-1, 2)] + [heights[-1]] * 64)
    page.set_viewport_size({"width": 500, "height": 700})
    page.wait_for_function("document.querySelector('canvas').width < 500")
    np.testing.assert_allclose(bars(page), heights, atol=0.03)
    page.get_by_role("button", name="Stop", exact=True).click()


def silent_after(page: Page, stop: str) -> np.ndarray:
    """Stop by a script: at once nothing is heard, and the page is ready again -> what was heard."""
    page.wait_for_function("device.currentTime * 24000 > starts[0][0] + 4000")
    stopped = page.evaluate(f"(() => {{ {stop}; return device.currentTime * 24000; }})()")
    page.wait_for_function("frame => device.currentTime * 24000 > frame + 12000", arg=stopped)
    heard = heard_by(page)
    loud = np.flatnonzero(heard)
    assert loud[0] >= LEAD
    # What has been handed to the device when the page asks can no longer be taken back.
    assert loud[-1] <= stopped + FADE + 2048
    assert page.get_by_role("button", name="Stop", exact=True).is_disabled()
    assert page.get_by_role("button", name="Speak", exact=True).is_enabled()
    assert page.get_by_role("status").first.inner_text() == ""
    return heard


def test_stop_is_silence_at_once_and_a_free_slot(visit: Visitor, served: Running) -> None:
    page = visit(EAR)
    speak(page, LONG)
    expect(page.get_by_text(" ms")).to_be_visible()
    assert served.engine.stats().slots_used == 1
    silent_after(page, "document.getElementById('stop').focus(); document.getElementById('stop').click()")
    assert wait_until(lambda: is_idle(served.engine), 2) < 2
    assert page.evaluate("document.activeElement.id") == "go"
    assert figure(page, "Pauses").isdecimal()


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_when_all_has_come_but_not_been_played(visit: Visitor, by: str) -> None:
    page = visit(EAR + SENDER)
    speak(page)
    page.wait_for_function("window.controller")
    send(page, np.full(10 * RATE, 0.25))
    page.evaluate("controller.close()")
    expect(page.get_by_text("10.0 s")).to_be_visible()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_enabled()
    stops = {
        "button": "document.getElementById('stop').click()",
        "key": "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))",
    }
    heard, pauses = without_pauses(silent_after(page, stops[by]))
    heard = heard[np.flatnonzero(heard)[0] :]
    assert heard.max() > 0.2
    # It fades, and does not click; a pause in the fade is a step of it.
    assert (np.abs(np.diff(heard)) >= 0.01).sum() <= pauses


def test_it_is_over_when_the_last_has_been_played(visit: Visitor) -> None:
    page = visit(EAR + SENDER)
    speak(page)
    page.wait_for_function("window.controller")
    send(page, np.full(FRAME, 0.25))
    page.wait_for_function("device.currentTime * 24000 > starts[0][0] + 4000")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_enabled()  # more may come
    send(page, np.full(9600, 0.25))
    page.evaluate("controller.close()")
    wait_until_over(page)
    starts = starts_of(page)
    assert page.evaluate("device.currentTime * 24000") >= sum(starts[-1])
    assert np.count_nonzero(heard_by(page)) == FRAME + 9600
    assert figure(page, "Pauses") == "1"


def test_speaking_again_ends_what_is_spoken(visit: Visitor, served: Running, seed: int) -> None:
    page = visit(EAR)
    asked = seeded(page, seed=seed, max_seconds=1.2)
    speak(page)
    page.wait_for_function("starts.length && device.currentTime * 24000 > starts[0][0] + 2000")
    before = page.evaluate("(document.getElementById('go').click(), starts.length)")
    page.wait_for_function("count => starts.length > count", arg=before)
    wait_until_over(page)
    samples = pcm(served.speech(**asked[1]).content)
    assert asked[0]["seed"] != asked[1]["seed"]
    starts, heard = starts_of(page)[before:], heard_by(page)
    first = starts[0][0]
    assert_heard(heard[first:], expected(starts, samples, len(heard))[first:])
    assert figure(page, "Audio") == "1.2 s"
    assert page.get_by_role("status").first.inner_text() == ""


@pytest.mark.parametrize("moment", ["asked", "speaking"])
def test_leaving_the_page_frees_the_slot(visit: Visitor, served: Running, moment: str) -> None:
    page = visit()
    speak(page, LONG)
    if moment == "speaking":
        expect(page.get_by_text(" ms")).to_be_visible()
    else:
        wait_until(lambda: not is_idle(served.engine))
    page.close()
    wait_until(lambda: is_idle(served.engine), 3)


def test_what_is_wrong_is_said(visit: Visitor, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit(refused=("400", "429"))
    message, stop = page.get_by_role("status").first, page.get_by_role("button", name="Stop", exact=True)
    speak(page, "")  # the browser says it itself, and nothing is asked
    assert page.evaluate("document.querySelector('textarea').validity.valueMissing")
    assert stop.is_disabled()
    speak(page, "   ")
    expect(message).to_have_text("There is no text to say. Give at least one letter.")
    expect(stop).to_be_disabled()
    monkeypatch.setattr(served.engine.loop.scheduler, "retry_after", lambda *_: 2.0)
    speak(page, "Hello.")
    expect(message).to_have_text(re.compile(r"\w+ .*\.$"))
    expect(message).not_to_have_text(re.compile("no text"))
    expect(stop).to_be_disabled()
    monkeypatch.undo()
    seeded(page, max_seconds=0.4)
    speak(page)
    expect(message).to_have_text("")
    wait_until_over(page)
    assert figure(page, "Audio") == "0.4 s"


def test_a_connection_that_breaks_is_said_and_what_came_is_played(
    visit: Visitor, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(EAR, refused=("INCOMPLETE_CHUNKED", "502"))
    following, ready = LiveSpeech.__anext__, LiveSpeech.ready
    given, is_played = 0, threading.Event()

    async def awaited(self: LiveSpeech) -> Any:
        nonlocal given
        if given == 4:
            # A browser drops what it has not yet read when the connection breaks.
            assert await asyncio.to_thread(is_played.wait, 20)
            raise RuntimeError("of the model")
        chunk = await following(self)
        given += 1
        return chunk

    def there(self: LiveSpeech) -> Any:
        nonlocal given
        chunk = ready(self) if given < 4 else None
        given += chunk is not None
        return chunk

    monkeypatch.setattr(LiveSpeech, "__anext__", awaited)
    monkeypatch.setattr(LiveSpeech, "ready", there)
    speak(page)
    page.wait_for_function("count => starts.reduce((sum, [, length]) => sum + length, 0) === count", arg=4 * FRAME)
    is_played.set()
    message = page.get_by_role("status").first
    expect(message).to_have_text("The connection to the server broke. Is it running?")
    wait_until_over(page)
    assert np.count_nonzero(heard_by(page)) > 3 * FRAME
    assert figure(page, "Audio") == "0.3 s"
    expect(message).to_have_text(re.compile("broke"))
    monkeypatch.undo()
    page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    speak(page)
    expect(message).to_have_text("The server answered with 502.")


def test_a_file_becomes_a_voice_and_is_deleted(visit: Visitor, served: Running, seed: int) -> None:
    page = visit(EAR, refused=("400", "409"))
    page.get_by_text("Add a voice").click()
    added, listen = page.get_by_role("status").last, page.get_by_role("button", name="Listen")
    name, consent = page.get_by_label("Name"), page.get_by_label("How the speaker agreed")
    chooser = page.get_by_label(re.compile("Sample"))
    name.fill("from-a-file")
    consent.fill("I agree.")
    page.get_by_label("What is said in it").fill("Hello there.")
    add = page.get_by_role("button", name="Add", exact=True)
    add.click()
    expect(added).to_have_text("Choose a file, or record a sample.")
    chooser.set_input_files({"name": "notes.wav", "mimeType": "audio/wav", "buffer": b"no audio"})
    listen.click()
    expect(added).to_have_text(re.compile("This browser cannot play"))
    add.click()
    expect(added).to_have_text(re.compile("is no audio that can be read"))
    samples = sample(1.5, seed)
    chooser.set_input_files({"name": "me.wav", "mimeType": "audio/wav", "buffer": wav(samples)})
    expect(page.get_by_text("me.wav", exact=True)).to_be_visible()

    listen.click()
    page.wait_for_function("starts.length")
    expect(listen).to_be_visible(timeout=5000)  # it says Stop while it plays
    heard = np.trim_zeros(heard_by(page))
    np.testing.assert_allclose(heard, np.trim_zeros(pcm((samples * 32768).round().astype("<i2").tobytes())), atol=1e-4)

    name.fill("alloy")
    add.click()
    expect(added).to_have_text(re.compile("stands for another voice"))
    name.fill("from-a-file")
    add.click()
    expect(added).to_have_text("The voice from-a-file is added and chosen.")
    expect(page.get_by_label("Voice", exact=True)).to_have_value("from-a-file")
    expect(name).to_have_value("")
    with served.client() as client:
        (record,) = client.get("/v1/audio/voices").json()["voices"]
    assert (record["text"], record["consent"], record["seconds"]) == ("Hello there.", "I agree.", 1.5)

    asked = seeded(page, max_seconds=0.4)
    before = page.evaluate("starts.length")
    speak(page)
    wait_until_over(page)
    assert asked[0]["voice"] == "from-a-file"
    spoken, starts = pcm(served.speech(**asked[0]).content), starts_of(page)[before:]
    assert not np.array_equal(spoken, pcm(served.speech(**{**asked[0], "voice": "alloy"}).content))
    heard = heard_by(page)
    assert_heard(heard[starts[0][0] :], expected(starts, spoken, len(heard))[starts[0][0] :])

    delete = page.get_by_role("button", name="Delete")
    page.once("dialog", lambda dialog: dialog.dismiss())
    delete.click()
    expect(page.get_by_label("Voice", exact=True)).to_have_value("from-a-file")
    page.once("dialog", lambda dialog: dialog.accept())
    delete.click()
    expect(page.get_by_label("Voice", exact=True)).to_have_value("alloy")
    expect(delete).to_be_hidden()
    with served.client() as client:
        assert client.get("/v1/audio/voices").json()["voices"] == []


def test_a_recording_becomes_a_voice(visit: Visitor, served: Running) -> None:
    page = visit(EAR)
    page.get_by_text("Add a voice").click()
    page.get_by_label(re.compile("Sample")).set_input_files({"name": "x.wav", "mimeType": "audio/wav", "buffer": b"x"})
    page.get_by_role("button", name="Record").click()
    add = page.get_by_role("button", name="Add", exact=True)
    expect(add).to_be_disabled()
    expect(page.get_by_text(re.compile(r"Recording, [1-9]\d* s"))).to_be_visible()
    page.get_by_role("button", name="Stop recording").click()
    told = page.get_by_text(re.compile(r"Recorded, [1-9]\d* s"))
    expect(told).to_be_visible()
    seconds = int("".join(filter(str.isdigit, told.inner_text())))
    expect(add).to_be_enabled()
    assert page.get_by_label(re.compile("Sample")).input_value() == ""  # the recording takes the file's place
    page.get_by_role("button", name="Listen").click()
    page.wait_for_function("caught.some(([, samples]) => samples.some(value => Math.abs(value) > .01))")
    page.locator("#listen", has_text="Stop").click()
    expect(page.get_by_role("button", name="Listen")).to_be_enabled()
    page.get_by_label("Name").fill("recorded")
    page.get_by_label("How the speaker agreed").fill("It is me.")
    add.click()
    expect(page.get_by_role("status").last).to_have_text("The voice recorded is added and chosen.")
    expect(page.get_by_role("button", name="Record", exact=True)).to_be_enabled()
    seeded(page, max_seconds=0.4)
    speak(page)
    wait_until_over(page)
    assert figure(page, "Audio") == "0.4 s"
    with served.client() as client:
        (record,) = client.get("/v1/audio/voices").json()["voices"]
    assert seconds - 0.5 < record["seconds"] < seconds + 4


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })", "only over https or on localhost"),
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('Permission denied') }",
            "The microphone cannot be used: Permission denied.",
        ),
    ],
    ids=["without-https", "denied"],
)
def test_without_a_microphone_it_says_why(visit: Visitor, script: str, sentence: str) -> None:
    page = visit(script)
    page.get_by_text("Add a voice").click()
    for _ in range(2):
        page.get_by_role("button", name="Record").click()
        expect(page.get_by_role("status").last).to_have_text(re.compile(re.escape(sentence)))


def test_a_key_is_asked_for_once(visit: Visitor, served: Running, browser: Browser) -> None:
    with serving(served.engine, Settings(model="small", keys=("secret",))) as guarded:
        with browser.new_context() as stranger:
            assert stranger.request.get(guarded.url).status == 401
        page = visit(running=guarded, http_credentials={"username": "", "password": "secret"})
        seeded(page, max_seconds=0.4)
        speak(page)
        wait_until_over(page)
        assert figure(page, "Audio") == "0.4 s"
        page.context.close()


def test_on_a_phone(visit: Visitor, seed: int) -> None:
    page = visit(viewport={"width": 375, "height": 667}, device_scale_factor=3, has_touch=True, is_mobile=True)
    long_name = "a" * 64
    seeded(page, max_seconds=0.8)
    page.get_by_role("button", name="Speak", exact=True).tap()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_enabled()
    wait_until_over(page)
    page.get_by_text("Add a voice").tap()
    page.get_by_role("button", name="Record").tap()
    expect(page.get_by_text(re.compile(r"Recording, \d+ s"))).to_be_visible()
    page.get_by_role("button", name="Speak", exact=True).tap()  # it would record itself
    expect(page.get_by_text("Recorded, ")).to_be_visible()
    page.get_by_role("button", name="Stop", exact=True).tap()
    page.get_by_label(re.compile("Sample")).set_input_files(
        {"name": "b" * 90 + ".wav", "mimeType": "audio/wav", "buffer": wav(sample(0.5, seed))}
    )
    page.get_by_label("Name").fill(long_name)
    page.get_by_label("How the speaker agreed").fill("I agree.")

    def fits(width: int) -> None:
        page.set_viewport_size({"width": width, "height": 667})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        rights = page.evaluate("[...document.body.querySelectorAll('*')].map(e => e.getBoundingClientRect().right)")
        assert max(rights) <= width
        for control in page.locator("button:visible, select, input, textarea, summary").all():
            box = control.bounding_box()
            assert box is not None
            assert box["height"] >= 40, control.inner_text()
            assert box["width"] >= 40

    fits(320)
    fits(375)
    page.get_by_role("button", name="Add", exact=True).tap()
    expect(page.get_by_role("status").last).to_have_text(re.compile("is added and chosen"))
    for index, text in enumerate(("12345 ms", "12.3 ×", "1234.5 s", "12")):
        page.locator("dd").nth(index).evaluate("(figure, text) => { figure.textContent = text; }", text)
    fits(375)
    fits(320)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").tap()
    expect(page.get_by_label("Voice", exact=True)).to_have_value("alloy")
    # Fields of less than 16 px make a phone zoom in when they are touched.
    for field in page.locator("input, textarea, select").all():
        assert field.evaluate("field => parseFloat(getComputedStyle(field).fontSize)") >= 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(visit: Visitor, scheme: str) -> None:
    page = visit(color_scheme=scheme, refused=("400",))
    page.get_by_text("Add a voice").click()
    speak(page, " ")
    expect(page.get_by_role("status").first).to_have_text(re.compile("no text"))
    contrasts = page.evaluate(CONTRAST)
    seen = {name for name, _ in contrasts}
    assert {"message", "go", "text", "voice", "first", "LABEL", "DT", "SUMMARY", "taken"} <= seen
    assert [(name, contrast) for name, contrast in contrasts if contrast < 4.5] == []
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 100")
    assert is_dark == (scheme == "dark")


def test_by_keyboard_alone(visit: Visitor, served: Running) -> None:
    page = visit()
    asked = seeded(page)
    page.get_by_label("Text").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(LONG)
    page.keyboard.press("Enter")  # a new line, as in any text
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text(" ms")).to_be_visible()
    assert [body["input"] for body in asked] == [LONG + "\n"]
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()
    wait_until(lambda: is_idle(served.engine), 2)
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["voice", "go", "SUMMARY", "BODY"]
    page.get_by_text("Add a voice").press("Enter")
    names = page.evaluate("[...document.querySelectorAll('input, textarea, select')].map(e => e.labels.length)")
    assert set(names) == {1}
