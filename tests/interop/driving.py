"""How tests drive the page: Chromium's arguments, scripts that listen in, and what can be read off the page."""

from __future__ import annotations

import base64
import itertools
import json
import re
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, Route, expect

from server.running import RATE

ARGUMENTS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync
--disable-component-update --use-fake-device-for-media-stream --use-fake-ui-for-media-stream
"""
LEAD = 2400  # samples that the first chunk waits
QUANTUM = 128  # samples that an AudioContext renders at once
FADE = 240  # samples that stopping takes
FEW_QUANTA = 6  # 32 ms

# Keeps all that reaches the destination, with when, and every start that the page asks for; in samples.
EAR = """
const device = window.device = new AudioContext({ sampleRate: 24000 }); window.caught = []; window.starts = [];
const { connect } = AudioNode.prototype, { start } = AudioBufferSourceNode.prototype;
const worklet = `registerProcessor("ear", class extends AudioWorkletProcessor {
  process([input]) { this.port.postMessage([currentFrame, input[0] || new Float32Array(128)]); return true; } });`;
window.ready = device.audioWorklet.addModule(URL.createObjectURL(new Blob([worklet], { type: "text/javascript" })))
  .then(() => {
    const ear = new AudioWorkletNode(device, "ear");
    connect.call(ear, device.destination);
    ear.port.onmessage = ({ data }) => caught.push(data);
    AudioNode.prototype.connect = function (to) {
      if (to === device.destination) connect.call(this, ear);
      return connect.call(this, to);
    };
  });
AudioBufferSourceNode.prototype.start = function (when) {
  starts.push([Math.round((when ?? device.currentTime) * 24000), this.buffer.length]);
  start.call(this, when);
};
window.AudioContext = function () { return device; };
"""
# What the ear has caught: rows of when and 128 samples, as float32.
CAUGHT = """() => {
  const rows = new Float32Array(caught.flatMap(([frame, samples]) => [frame, ...samples]));
  const bytes = new Uint8Array(rows.buffer), parts = [];
  for (let at = 0; at < bytes.length; at += 8192) parts.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
  return btoa(parts.join(""));
}"""
# Speech that the test sends, in place of the server's.
SENDER = """
const realFetch = fetch;
window.fetch = (path, options) => path !== "v1/audio/speech" ? realFetch(path, options) : Promise.resolve(new Response(
  new ReadableStream({ start(controller) {
    window.controller = controller;
    options.signal.onabort = () => { window.isAborted = true; controller.error(options.signal.reason); };
  } })));
window.send = bytes => controller.enqueue(Uint8Array.from(bytes));
"""
# A context whose time the test tells.
CLOCK = """
window.starts = [];
const device = window.device = {
  currentTime: 0, destination: {}, resume: async () => {},
  createBuffer: (channels, length, sampleRate) => new AudioBuffer({ length, sampleRate }),
  createGain: () => ({ connect() {}, gain: { setValueAtTime() {}, linearRampToValueAtTime() {} } }),
  createBufferSource: () => ({
    connect() {}, stop() {},
    start(when) { starts.push([when * 24000, this.buffer.length]); },
  }),
};
window.AudioContext = function () { return device; };
"""
# The figure of contrast of WCAG 2.2, of every element with text of its own.
CONTRAST = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const linear = value => value / 255 <= .04045 ? value / 255 / 12.92 : ((value / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = element => {
    const color = channels(getComputedStyle(element).backgroundColor);
    return color[3] === 0 ? ground(element.parentElement) : color;
  };
  const hasText = element => element.matches("input, textarea, select") ||
    [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const all = [...document.querySelectorAll("body *")];
  return all.filter(element => element.checkVisibility() && !element.disabled && hasText(element)).map(element => {
    const ink = luminance(channels(getComputedStyle(element).color)), paper = luminance(ground(element));
    return [element.id || element.tagName, (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)];
  });
}"""


class Visit:
    """A page that is open, what it complained of, and whom it asked."""

    def __init__(self, browser: Browser, url: str, script: str, **arguments: Any) -> None:
        # Neither the ear's worklet nor waiting for a condition is what the page's own policy lets in.
        self.browsing = browser.new_context(bypass_csp=bool(script), **arguments)
        self.page = self.browsing.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.partition("://")[2].partition("/")[0]))
        self.page.add_init_script(f"(() => {{ {script} }})()")
        self.page.route("**/favicon.ico", lambda route: route.fulfill(status=204))  # which the policy does not let in
        self.host = url.partition("://")[2]
        self.page.goto(url)
        expect(self.page.get_by_label("Voice", exact=True)).to_have_value(re.compile("."))
        if script.startswith(EAR):
            self.page.evaluate("ready.then(() => {})")


def seeded(page: Page, **more: Any) -> list[dict[str, Any]]:
    """Add a seed, and what else is given, to what the page asks for -> all that it asked for."""
    asked: list[dict[str, Any]] = []
    seeds = itertools.count(more.pop("seed", 7))

    def add(route: Route) -> None:
        asked.append({**json.loads(route.request.post_data or ""), "seed": next(seeds), **more})
        route.continue_(post_data=json.dumps(asked[-1]))

    page.route("**/v1/audio/speech", add)
    return asked


def speak(page: Page, text: str | None = None) -> None:
    """Type a text, and have it spoken."""
    if text is not None:
        page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Speak", exact=True).click()


def send(page: Page, samples: np.ndarray) -> None:
    """Send samples as a chunk, in place of the server."""
    data = base64.b64encode((samples * 32768).round().astype("<i2").tobytes()).decode()
    page.evaluate("data => send([...atob(data)].map(byte => byte.charCodeAt(0)))", data)


def wait_until_over(page: Page) -> None:
    """Wait until all has been played."""
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled(timeout=20_000)


def starts_of(page: Page) -> list[tuple[int, int]]:
    """When each chunk was to start, and its length; in samples."""
    return [(start, length) for start, length in page.evaluate("starts")]


def heard_by(page: Page) -> np.ndarray:
    """All that reached the destination, by when -> float32 [samples]."""
    now = page.evaluate("device.currentTime * 24000")
    page.wait_for_function("now => caught.at(-1)?.[0] >= now - 128", arg=now)
    data = np.frombuffer(base64.b64decode(page.evaluate(CAUGHT)), "<f4").reshape(-1, 1 + QUANTUM)
    timeline = np.zeros(int(data[-1, 0]) + QUANTUM, np.float32)
    for row in data:
        timeline[int(row[0]) : int(row[0]) + QUANTUM] = row[1:]
    timeline[np.abs(timeline) < 1e-9] = 0  # times are floats: a chunk's end may reach a hair into the next sample
    return timeline


def expected(starts: list[tuple[int, int]], samples: np.ndarray, size: int) -> np.ndarray:
    """What is heard of samples that are played in chunks at their times -> float32 [size]."""
    timeline = np.zeros(max(size, starts[-1][0] + starts[-1][1]), np.float32)
    place = 0
    for start, length in starts:
        timeline[start : start + length] = samples[place : place + length]
        place += length
    assert place == len(samples)
    return timeline[:size]


def without_pauses(heard: np.ndarray) -> tuple[np.ndarray, int]:
    """What was heard from its first loud quantum to its last, and the silent ones between them taken out and counted.

    A renderer does not wait for a node that the page is changing: for that quantum, it is silent.
    """
    quanta = heard[: len(heard) // QUANTUM * QUANTUM].reshape(-1, QUANTUM)
    is_loud = quanta.any(axis=1)
    first, last = np.flatnonzero(is_loud)[[0, -1]]
    kept = quanta[first : last + 1][is_loud[first : last + 1]]
    pauses = last + 1 - first - len(kept)
    assert pauses <= FEW_QUANTA, f"{pauses} quanta are silent"
    return kept.ravel(), int(pauses)


def assert_heard(heard: np.ndarray, wanted: np.ndarray) -> None:
    """The same, but for the last bits of a float, and a few quanta of a busy machine, see `without_pauses`."""
    assert heard.shape == wanted.shape
    wrong = np.unique(np.flatnonzero(np.abs(heard - wanted) > 1e-9) // QUANTUM)
    assert len(wrong) <= FEW_QUANTA, f"{len(wrong)} of {len(heard) // QUANTUM} quanta differ, the first is {wrong[0]}"


def gaps(starts: list[tuple[int, int]]) -> int:
    """How many chunks do not begin where the one before ends."""
    return sum(start + length != after for (start, length), (after, _) in itertools.pairwise(starts))


def figure(page: Page, name: str) -> str:
    """One of the figures."""
    return page.locator("dl div", has=page.locator(f'dt:text-is("{name}")')).locator("dd").inner_text()


def bars(page: Page) -> np.ndarray:
    """The height of each bar of the waveform, of 1 -> float64 [128]."""
    heights = page.evaluate("""() => {
      const canvas = document.querySelector("canvas"), { width, height } = canvas;
      const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
      return Array.from({ length: 128 }, (_, bar) => {
        const x = Math.floor((bar + .35) * width / 128);
        let count = 0;
        for (let y = 0; y < height; y++) count += data[4 * (y * width + x) + 3] > 64;
        return count / height;
      });
    }""")
    return np.array(heights)


def sample(seconds: float, seed: int) -> np.ndarray:
    """Something to clone -> float32 [samples]."""
    noise = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (0.3 * np.sin(np.arange(len(noise)) * 0.05) + 0.02 * noise).astype(np.float32)
