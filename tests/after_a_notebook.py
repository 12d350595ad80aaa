"""What the tests do in the kernel of a notebook, after its last cell has run.

A reader moves the controls and solves the exercises; so do the tests. `look_back` prints one line
of JSON with what it found, or raises an AssertionError that says what is wrong.
"""

import gc
import json
import sys
from pathlib import Path


def look_back(
    names: dict,  # the notebook's own
    wrong_answers: str | None,  # a file of functions `<check>__<what is wrong>`
) -> None:
    """Turn every control, try every wrong answer, and add up the time of training."""
    figures, exercises = of_foundations("figures"), of_foundations("exercises")
    turned = turn_every_control(names, figures.Explorer) if figures else 0
    checks = exercises.EXERCISES if exercises else {}
    checks = checks | names.get("EXERCISES", {})  # of the notebook that defines your_turn
    rejected = try_wrong_answers(names, checks, wrong_answers) if wrong_answers else 0
    found = {
        "controls": turned,
        "checks": sorted(checks),
        "rejected": rejected,
        "training": training_seconds(),
    }
    print(json.dumps(found))


def of_foundations(name):
    """A module of the foundations, if the notebook has imported it."""
    return sys.modules.get(f"shuffle_nb.foundations.{name}")


def turn_every_control(names, kind) -> int:
    """Draw each explorer with each control at another value; every picture must be another one."""
    explorers = {name: value for name, value in names.items() if isinstance(value, kind)}
    count = 0
    for title, explorer in explorers.items():
        first = picture(explorer.frame())  # the one on show has been laid out before, at its size
        assert picture(explorer.frame()) == first, f"{title}: drawn again, it is another picture"
        for name, control in explorer.controls.items():
            value = other_value(control)
            changed = picture(explorer.frame(**{name: value}))
            assert changed != first, f"{title}: {name} = {value!r} changes nothing"
            count += 1
    return count


def picture(figure):
    """A figure's pixels; few, for all that matters is whether they change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_width_height(), bytes(canvas.buffer_rgba())


def other_value(control):
    """A value that the control can take, and does not have."""
    if hasattr(control, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return next(value for value in values if value != control.value)
    if isinstance(control.value, bool):
        return not control.value
    if hasattr(control, "lower"):
        low, high = control.value
        step = control.step or 1
        return (low, high - step) if high - step > low else (low, high + step)
    if hasattr(control, "max"):
        return control.max if control.value != control.max else control.min
    raise AssertionError(f"no other value known for a {type(control).__name__}")


def try_wrong_answers(names, exercises, path) -> int:
    """Every check must reject two or more wrong answers, each with a sentence."""
    made = dict(names)  # a copy: the file may use the notebook's names, and changes none
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), made)
    answers = {name: value for name, value in made.items() if "__" in name.strip("_")}
    answers = {name: value for name, value in answers.items() if name not in names}
    for name in answers:
        check = name.split("__")[0]
        assert check in exercises, f"{name} is a wrong answer to no exercise: {sorted(exercises)}"
    for check, exercise in exercises.items():
        wrong = {name: answers[name] for name in answers if name.split("__")[0] == check}
        assert len(wrong) >= 2, (
            f"{check} needs two named wrong answers in {path}, got {list(wrong)}"
        )
        for name, answer in wrong.items():
            try:
                exercise.check(answer)
            except AssertionError as error:
                assert str(error).strip(), f"{check} rejects {name} without a sentence"
            else:
                raise AssertionError(f"{check} accepts {name}")
    return len(answers)


def training_seconds() -> float | None:
    """Processor time of all training that the notebook still knows of."""
    training = of_foundations("training")
    if training is None:
        return None
    runs = [thing for thing in gc.get_objects() if type(thing) is training.History]
    return sum(run.cpu_seconds for run in runs)
