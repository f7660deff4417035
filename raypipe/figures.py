"""The drawn figures of the sample clips: what they do, and how a camera sees it.

`draw_frames` draws one clip. Place, camera, figures and their first poses are drawn without knowing whether
there will be a scuffle: the first frame says nothing about it, only what the figures do afterwards.

Shapes: F frames, N figures, H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Floats = NDArray[np.float64]
Colour = tuple[int, int, int]


def draw_frames(
    size: tuple[int, int],
    *,
    frames: int,
    fps: int,
    scuffle: bool,
    rng: Callable[[str], np.random.Generator],
) -> Iterator[Frame]:
    """The frames of one clip, each uint8 [H, W, 3] RGB, drawn one at a time.

    `size` is width and height; `rng` gives the random numbers for each of "scene", "camera" and "action".
    """
    camera, (width, height) = rng("camera"), size
    background, outfits = draw_scene(size, rng("scene"))
    unit = camera.uniform(0.5, 0.8) * min(height, width)  # pixels of one figure height
    origin = width * camera.uniform(0.4, 0.6) + MARGIN, height * camera.uniform(0.86, 0.95) + MARGIN
    depths, builds = camera.uniform(-0.12, 0.02, 3), camera.uniform(0.9, 1.08, 3)
    distractor, traits = camera.choice(DISTRACTORS), camera.random(3)
    shifts = _camera_path(frames, camera)
    gain, flicker, grain = camera.uniform(0.65, 1.15), camera.choice([0.0, 0.0, 0.05]), camera.uniform(1, 5)
    speckle = camera.normal(128, grain, (height + 16, width + 16, 3)).astype(np.uint8)
    canvas = np.empty_like(background)

    room = 0.75 * width / unit
    first = first_states(camera, room=room)
    for f, states in enumerate(perform(first, frames, fps, rng("action"), scuffle=scuffle, room=room)):
        np.copyto(canvas, background)
        _draw_distractor(canvas, distractor, traits, f / fps, outfits[3])
        for n in np.argsort(depths[: len(first)]):
            feet = origin[0] + unit * states[n, X], origin[1] + unit * depths[n]
            draw_figure(canvas, states[n], feet=feet, height=unit * builds[n], outfit=outfits[n])
        (left, top), (u, v) = shifts[f], camera.integers(0, 16, 2)
        view, noise = canvas[top : top + height, left : left + width], speckle[v : v + height, u : u + width]
        light = gain * (1 + flicker * camera.uniform(-1, 1))
        yield np.asarray(cv2.addWeighted(view, light, noise, 1, -128), np.uint8)


# What the figures do.

POSES: dict[str, tuple[float, ...]] = {
    # Radians, forward positive: lean; shoulder and elbow of each arm; hip and knee (backward) of each leg.
    "stand": (0.00, 0.10, 0.20, -0.10, 0.20, 0.08, 0.05, -0.08, 0.05),
    "stride": (0.04, -0.40, 0.30, 0.40, 0.40, 0.40, 0.15, -0.35, 0.20),
    "chat": (0.03, 0.30, 1.40, -0.05, 0.25, 0.12, 0.05, -0.10, 0.10),
    "shrug": (-0.05, 0.25, 1.20, 0.15, 1.30, 0.05, 0.05, -0.05, 0.05),
    "point": (0.02, 1.35, 0.10, -0.10, 0.30, 0.15, 0.05, -0.10, 0.05),
    "wave": (0.00, 2.50, 0.50, -0.10, 0.20, 0.05, 0.05, -0.05, 0.05),
    "hug": (0.18, 1.25, 0.50, 1.05, 0.70, 0.15, 0.10, -0.20, 0.10),
    "bow": (0.65, 0.70, 0.40, 0.40, 0.50, 0.25, 0.35, -0.10, 0.25),
    "guard": (0.15, 0.70, 2.00, 0.50, 2.10, 0.35, 0.40, -0.25, 0.35),
    "punch": (0.35, 1.55, 0.05, -0.30, 1.90, 0.60, 0.45, -0.50, 0.15),
    "hook": (0.10, 2.20, 1.00, 0.40, 2.00, 0.30, 0.30, -0.40, 0.20),
    "shove": (0.50, 1.45, 0.15, 1.30, 0.20, 0.60, 0.50, -0.60, 0.15),
    "grapple": (0.70, 1.00, 0.80, 1.30, 0.60, 0.60, 0.70, -0.50, 0.30),
    "kick": (-0.35, -0.30, 1.20, 0.60, 1.60, 1.45, 0.25, -0.15, 0.15),
    "duck": (0.80, 0.80, 2.20, 0.60, 2.30, 0.90, 1.30, -0.10, 0.80),
    "reel": (-0.55, 1.10, 0.60, 0.70, 0.40, 0.45, 0.15, -0.45, 0.35),
}
FIRST_POSES = ("stand", "stride", "chat", "shrug", "point", "wave", "hug", "guard", "punch", "shove")
ACTS = ("walk", "jog", "chat", "wave", "hug")
STRIKES = ("punch", "hook", "shove", "grapple", "kick")
REACTIONS = ("reel", "reel", "duck", "guard", "grapple")
X, TURN, LEAN, ARM_A, ELBOW_A, ARM_B, ELBOW_B, HIP_A, KNEE_A, HIP_B, KNEE_B = range(11)
"""A figure's state [11]: place on the ground (in figure heights), facing (-1 left to 1 right), a pose."""
BODY = slice(LEAN, None)


def first_states(rng: np.random.Generator, *, room: float) -> Floats:
    """The two or three figures [N, 11] of a first frame, spread over at most `room` figure heights."""
    count = rng.choice([2, 2, 2, 3])
    places = np.cumsum(rng.uniform(0.3, 1.1, count))
    places = (places - (places[0] + places[-1]) / 2) * min(1.0, room / np.ptp(places))
    turns = -np.sign(places + 1e-6) * rng.choice([1, 1, 1, -1], count) * rng.uniform(0.5, 1.0, count)
    return np.array([[x, turn, *_pose(FIRST_POSES, rng)] for x, turn in zip(places, turns, strict=True)])


def perform(
    first: Floats, frames: int, fps: int, rng: np.random.Generator, *, scuffle: bool, room: float
) -> Floats:
    """States [F, N, 11] from `first` on: each joint follows its goal like a damped spring, legs add steps.

    In a scuffle the springs are stiff and overshoot.
    """
    times_s = np.arange(frames) / fps
    goals, quick_from_s = stroll_goals(first, times_s, rng, room=room), np.inf
    if scuffle:
        goals, quick_from_s = scuffle_goals(goals, times_s, rng, room=room)
    calm, quick = np.full(11, 7.0), np.full(11, rng.uniform(14, 24))
    calm[X], quick[X] = 5.0, 10.0
    state, velocity, phase = first.copy(), np.zeros_like(first), rng.uniform(0, 2 * np.pi, len(first))
    states, substeps = np.empty_like(goals), 4
    dt = 1 / (fps * substeps)
    for f, (now_s, goal) in enumerate(zip(times_s, goals, strict=True)):
        speed = np.abs(velocity[:, X])  # zero in the first frame, which is therefore `first` itself
        phase = phase + speed / fps * 2 * np.pi / 0.9
        swing, lift = 0.4 * np.clip(speed, 0, 1.4) * (np.sin(phase), np.cos(phase))
        states[f] = state
        states[f, :, [HIP_A, ARM_B]] += swing * [[1.0], [0.7]]
        states[f, :, [HIP_B, ARM_A]] -= swing * [[1.0], [0.7]]
        states[f, :, [KNEE_A, KNEE_B]] += 1.5 * np.maximum(0, [lift, -lift])
        springs, damping = (quick, 1.1) if now_s >= quick_from_s else (calm, 2.0)
        for _ in range(substeps):
            velocity = velocity + dt * springs * (springs * (goal - state) - damping * velocity)
            state = state + dt * velocity
    return states


def stroll_goals(first: Floats, times_s: Floats, rng: np.random.Generator, *, room: float) -> Floats:
    """Where calm figures are heading, [F, N, 11]: they walk or jog to and fro, or meet, chat, wave, hug."""
    goals = np.repeat(first[None], len(times_s), axis=0)
    act = rng.choice(ACTS)
    middle, gap = rng.normal(0, 0.15), 0.3 if act == "hug" else rng.uniform(0.4, 0.9)
    slots = _slots(first)
    for n, (x, turn) in enumerate(first[:, [X, TURN]]):
        pace = rng.uniform(1.2, 1.9) if act == "jog" else rng.uniform(0.4, 0.9)
        if act in ("walk", "jog"):  # and turn round at the edge: an empty frame would give a stroll away
            way = x + np.sign(turn) * pace * times_s
            goals[:, n, X] = room / 2 - np.abs((way + room / 2) % (2 * room) - room)
            goals[:, n, TURN] = 0.9 * np.sign(np.gradient(goals[:, n, X]))
            goals[:, n, BODY] = POSES["stand"]
            continue
        place = middle + gap * slots[n]
        goals[:, n, X] = x + np.clip(place - x, -pace * times_s, pace * times_s)
        goals[:, n, TURN] = -0.9 * np.sign(slots[n]) or turn
        for start_s in np.arange(0, times_s[-1], rng.uniform(0.6, 1.1)):
            gestures = ("stand", "chat", "shrug", "point", "bow") if act == "chat" else (act, "stand", act)
            goals[times_s >= start_s, n, BODY] = _pose(gestures, rng)
        if act == "wave":
            goals[:, n, [ELBOW_A, ELBOW_B]] += 0.6 * np.sin(times_s * rng.uniform(6, 12))[:, None]
    return goals


def scuffle_goals(
    calm: Floats, times_s: Floats, rng: np.random.Generator, *, room: float
) -> tuple[Floats, float]:
    """The goals `calm` [F, N, 11] broken off by a fight, and when it starts, in seconds."""
    goals, count, end_s = calm.copy(), calm.shape[1], times_s[-1]
    onset_s = end_s * (rng.uniform(0, 0.15) if rng.random() < 0.6 else rng.uniform(0.15, 0.45))
    hold_s = rng.uniform(0.3, 0.5) if rng.random() < 0.3 else rng.uniform(0.15, 0.3)
    pause_s = end_s * rng.uniform(0.4, 2.0)
    start = calm[np.searchsorted(times_s, onset_s)]
    slots, middle, gap, now_s = _slots(start), start[:, X].mean(), rng.uniform(0.3, 0.5), onset_s
    while now_s < end_s:
        later = times_s >= now_s
        striker, struck, *others = rng.permutation(count)
        towards = np.sign(slots[struck] - slots[striker])
        middle = np.clip(middle + towards * rng.uniform(0, 0.2), -room / 4, room / 4)
        goals[later, :, X] = middle + slots * gap + rng.uniform(-0.1, 0.1, count)
        goals[later, :, TURN] = np.sign(slots[struck] - slots)
        goals[later, struck, TURN] = -towards
        goals[later, striker, BODY] = _pose(STRIKES, rng)
        goals[later, struck, BODY] = _pose(REACTIONS, rng)
        for n in others:
            goals[later, n, BODY] = _pose(("guard", "shove", "grapple"), rng)
        now_s += hold_s * rng.uniform(0.7, 1.3)
        if now_s > pause_s:
            goals[times_s >= now_s, :, BODY] = _pose(("guard", "stand"), rng)
            now_s, pause_s = now_s + rng.uniform(0.3, 0.6), np.inf
    return goals, onset_s


def _slots(states: Floats) -> Floats:
    """Each figure's place in the line from left to right, zero in the middle: three get -1, 0 and 1."""
    ranks: Floats = np.argsort(np.argsort(states[:, X])).astype(np.float64)
    return ranks - (len(states) - 1) / 2


def _pose(names: Sequence[str], rng: np.random.Generator) -> Floats:
    """One of the named poses [9], or its mirror image (arms and legs swapped), not quite exact."""
    pose: Floats = np.array(POSES[rng.choice(names)])
    mirrored = pose[[0, 3, 4, 1, 2, 7, 8, 5, 6]] if rng.random() < 0.5 else pose
    return mirrored + rng.normal(0, 0.08, len(pose))


# How it is drawn.

MARGIN = 12
"""Pixels drawn beyond each edge of the frame, for the camera to shake in."""
DISTRACTORS = ("none", "car", "tree", "walker")


class Outfit(NamedTuple):
    """A figure's colours."""

    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour


def draw_figure(
    canvas: Frame, state: Floats, *, feet: tuple[float, float], height: float, outfit: Outfit
) -> None:
    """Draws one figure onto `canvas`, standing at `feet` (x, y in pixels), `height` pixels tall."""
    turn = np.clip(state[TURN], -1, 1)
    across = np.array([0.02 + 0.07 * np.sqrt(1 - turn**2), 0])  # half the shoulders' width, as seen

    def reach(start: Floats, angle: float, length: float) -> Floats:
        return start + length * np.array([turn * np.sin(angle), np.cos(angle)])

    hips, lean = np.zeros(2), np.pi - state[LEAN]
    neck, chin = reach(hips, lean, 0.3), reach(hips, lean, 0.36)
    head = reach(neck, np.pi - 0.6 * state[LEAN], 0.11)
    face = reach(head, np.pi / 2, 0.02)
    strokes: list[tuple[Floats, Floats, Colour, float]] = []  # from, to, colour, width; in figure heights
    for side, shade, arm, leg in ((1, 0.75, ARM_B, HIP_B), (-1, 1.0, ARM_A, HIP_A)):
        skin, hair, shirt, trousers = (_shade(colour, shade) for colour in outfit)
        hip, shoulder = hips + 0.5 * side * across, neck + side * across
        knee, elbow = reach(hip, state[leg], 0.25), reach(shoulder, state[arm], 0.16)
        ankle = reach(knee, state[leg] - state[leg + 1], 0.24)
        hand = reach(elbow, state[arm] + state[arm + 1], 0.17)
        toes = reach(ankle, np.pi / 2, 0.06)
        strokes += [(hip, knee, trousers, 0.09), (knee, ankle, trousers, 0.07), (ankle, toes, hair, 0.05)]
        if arm == ARM_A:  # trunk and head hide the far arm, the near arm hides them
            strokes += [(hips, neck, shirt, 0.15), (neck, chin, skin, 0.05)]
            strokes += [(head, head, hair, 0.15), (face, face, skin, 0.125)]
        strokes += [(shoulder, elbow, shirt, 0.065), (elbow, hand, skin, 0.05)]

    points = np.array([stroke[:2] for stroke in strokes])
    points = np.array(feet) + height * (points - [0, points[..., 1].max()])
    sixteenths = (points * 16).round().astype(int).tolist()
    for (start, end), (_, _, colour, width) in zip(sixteenths, strokes, strict=True):
        cv2.line(canvas, start, end, colour, max(1, round(width * height)), cv2.LINE_AA, shift=4)


def draw_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Frame, list[Outfit]]:
    """A place, uint8 [H + 2 margins, W + 2 margins, 3], alike at every `size`, and four people's clothes."""
    width, height = size[0] + 2 * MARGIN, size[1] + 2 * MARGIN
    outfits = [
        Outfit(skin, _colour(rng, 10, 110), _colour(rng, 20, 240), _colour(rng, 10, 150))
        for skin in (_shade((240, 200, 170), brightness) for brightness in rng.uniform(0.4, 1, 4))
    ]
    kind, horizon = rng.choice(["street", "room", "park", "hall"]), rng.uniform(0.5, 0.72)
    far, near, floor = (np.array(_colour(rng, 50, 230)) for _ in range(3))
    down = np.linspace(0, 1, height)[:, None, None]
    light = np.where(down < horizon, far + (near - far) * down / horizon, floor * (1.3 - 0.6 * down))
    canvas = light.repeat(width, axis=1).clip(0, 255).astype(np.uint8)
    for i in range(6):
        x, y, left, colour = rng.uniform(0, 1), rng.uniform(0.05, 0.4), i / 6, _colour(rng, 40, 220)
        if kind == "street":
            _box(canvas, left, y, left + 1 / 6, horizon, colour)
            for column, row in product((left + 0.03, left + 0.1), np.arange(y + 0.04, horizon - 0.06, 0.09)):
                _box(canvas, column, row, column + 0.03, row + 0.05, _shade(colour, 0.5))
            _box(canvas, left, 0.8, left + 0.08, 0.81, (200, 200, 190))
        elif kind == "room":
            _box(canvas, x, y, x + 0.15, y + 0.17, _shade(colour, 0.4))
            _box(canvas, x + 0.01, y + 0.015, x + 0.14, y + 0.155, colour)
            _box(canvas, 0, horizon + 0.08 * i, 1, horizon + 0.08 * i, _shade(colour, 0.4))
        elif kind == "park":
            _box(canvas, x, y, x + 0.02, horizon + 0.03, (80, 60, 40))
            _disc(canvas, x + 0.01, y, 0.13, _shade((80, 150, 70), rng.uniform(0.5, 1.3)))
            _disc(canvas, rng.uniform(0, 1), horizon, 0.08, _shade((90, 140, 60), rng.uniform(0.5, 1.3)))
        elif kind == "hall":
            _box(canvas, left, 0, left + 0.04, horizon + 0.02, _shade(colour, 0.8))
            _box(canvas, 0, horizon + i**2 / 72, 1, horizon + i**2 / 72, colour)
    blotches = rng.normal(0, rng.uniform(1, 8), (24, 32, 3))
    texture = cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    return (canvas + texture).clip(0, 255).astype(np.uint8), outfits


def _draw_distractor(canvas: Frame, kind: str, traits: Floats, now_s: float, outfit: Outfit) -> None:
    """Something else that moves; `traits` [3] in 0..1 are its place, its pace and its size."""
    place, pace, bulk = traits
    x = (place + (0.1 + 0.4 * pace) * now_s) % 1.4 - 0.2
    if kind == "car":
        long = 0.15 + 0.15 * bulk
        _box(canvas, x, 0.62, x + long, 0.7, outfit.shirt)
        _box(canvas, x + 0.2 * long, 0.55, x + 0.8 * long, 0.62, outfit.trousers)
        _disc(canvas, x + 0.2 * long, 0.7, 0.03, (20, 20, 20))
        _disc(canvas, x + 0.8 * long, 0.7, 0.03, (20, 20, 20))
    elif kind == "tree":
        for i in range(6):
            sway = (0.01 + 0.03 * pace) * np.sin(now_s * (2 + 4 * bulk) + i) * i / 6
            _disc(canvas, place + sway + 0.02 * (i % 3), 0.6 - 0.1 * i, 0.06, (40, 90 + 10 * i, 50))
    elif kind == "walker":
        swing, (height, width) = 0.5 * np.sin(now_s * (4 + 4 * pace)), canvas.shape[:2]
        state = np.array([0, 0.9, 0, swing, 0.3, -swing, 0.3, -swing, 0.2, swing, 0.2])
        feet = x * width, 0.72 * height
        draw_figure(canvas, state, feet=feet, height=(0.25 + 0.1 * bulk) * height, outfit=outfit)


def _box(canvas: Frame, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
    """A filled box, in shares of the canvas."""
    height, width = canvas.shape[:2]
    corners = round(left * width), round(top * height), round(right * width), round(bottom * height)
    cv2.rectangle(canvas, corners[:2], corners[2:], colour, cv2.FILLED)


def _disc(canvas: Frame, x: float, y: float, radius: float, colour: Colour) -> None:
    """A filled disc, in shares of the canvas, the radius in shares of its height."""
    height, width = canvas.shape[:2]
    centre = round(x * width), round(y * height)
    cv2.circle(canvas, centre, round(radius * height), colour, cv2.FILLED, cv2.LINE_AA)


def _camera_path(frames: int, rng: np.random.Generator) -> NDArray[np.int_]:
    """The view's left and top edge on the canvas [F, 2], in pixels: still, shaking or panning."""
    shake = rng.normal(0, rng.choice([0.0, 0.7, 2.0]), (frames + 4, 2))
    smooth = np.mean([shake[i : i + frames] for i in range(5)], axis=0)
    pan = np.linspace(0, 1, frames)[:, None] * rng.uniform(-8, 8, 2) * rng.choice([0, 1])
    path: NDArray[np.int_] = (MARGIN + smooth + pan).round().clip(0, 2 * MARGIN).astype(np.int_)
    return path


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    """A muted colour: a grey of `low` to `high`, tinted."""
    red, green, blue = (rng.integers(low, high) + rng.normal(0, 28, 3)).clip(0, 255).astype(int).tolist()
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue
