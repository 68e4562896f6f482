"""What a user types on the command line: labels, seeds, ranges."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from var_fast.errors import UserError

DEFAULT_IMAGES = 16
MAX_IMAGES = 100_000
MAX_SEED = 2**63 - 1
SHOW_LABELS = "var-fast sample --list-labels shows them"


def parse_seeds(text: str) -> list[int]:
    """Seeds of "3", "0-15" or "1,5,8-10". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        numbers = _parse_range(part)
        if numbers is None or numbers[-1] > MAX_SEED:
            raise UserError(
                f"--seeds holds {part.strip()!r}, expected numbers up to 2^63 - 1 and ranges, as in 0-15 or 1,5,7"
            )
        seeds.extend(numbers)
    return seeds


def parse_labels(text: str, num_classes: int, classes: Sequence[str] | None) -> list[int]:
    """Labels of "3", "0-7", a class name in any case, or several of these with commas. Raises UserError.

    What is a number or a range is never a name. `classes`: the names by label, None if the model has none.
    """
    names: dict[str, int] = {}
    for label, name in enumerate(classes or ()):
        names.setdefault(name.casefold(), label)
    # A name may hold commas itself, if it is the only one.
    parts = [text] if text.strip().casefold() in names else text.split(",")
    labels: list[int] = []
    for part in (part.strip() for part in parts):
        numbers = _parse_range(part)
        if numbers is not None:
            if numbers[-1] >= num_classes:
                raise UserError(f"label is {numbers[-1]}, expected 0 to {num_classes - 1} ({SHOW_LABELS})")
            labels.extend(numbers)
        elif part.casefold() in names:
            labels.append(names[part.casefold()])
        elif classes and re.fullmatch(r"[+-]?\d*", part) is None:
            close = difflib.get_close_matches(part.casefold(), names, n=1, cutoff=0.4)
            guess = f"did you mean {classes[names[close[0]]]!r}? " if close else ""
            raise UserError(f"label {part!r} is no class of this model; {guess}({SHOW_LABELS})")
        else:
            known = "a number" if classes else "a number, for this model has no class names:"
            raise UserError(f"label is {part!r}, expected {known} from 0 to {num_classes - 1}")
    return labels


def _parse_range(text: str) -> range | None:
    """The numbers of "7" or "3-9"; None if it is neither. Raises UserError for a range that is empty or too long."""
    found = re.fullmatch(r"\s*([0-9]{1,20})(?:\s*-\s*([0-9]{1,20}))?\s*", text)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise UserError(f"range {text.strip()!r} runs backwards, expected the smaller number first")
    if last - first >= MAX_IMAGES:
        raise UserError(f"range {text.strip()!r} is too long, expected at most {MAX_IMAGES} numbers")
    return range(first, last + 1)


def parse_box(text: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of "8,4,24,20", in pixels, the last two not in the box. Raises UserError."""
    found = re.fullmatch(r"\s*([0-9]{1,9})" + r"\s*,\s*([0-9]{1,9})" * 3 + r"\s*", text)
    left, top, right, bottom = map(int, found.groups()) if found else (0, 0, 0, 0)
    if left >= right or top >= bottom:
        raise UserError(f"--box is {text!r}, expected x0,y0,x1,y1 in pixels, x0 < x1 and y0 < y1, as in 8,4,24,20")
    return left, top, right, bottom


def spread(num_classes: int, count: int = DEFAULT_IMAGES) -> list[int]:
    """At most `count` labels, evenly over all classes, the first and the last included."""
    if num_classes <= count:
        return list(range(num_classes))
    return [round(i * (num_classes - 1) / (count - 1)) for i in range(count)]


def image_name(label: int, seed: int, classes: Sequence[str] | None) -> str:
    """File name of one image: "label3-face-smiling-seed0.png"."""
    name = re.sub(r"\W+", "-", classes[label].lower()).strip("-")[:80] if classes else ""
    return f"label{label}{'-' * bool(name)}{name}-seed{seed}.png"
