"""`tilewise demo`: what is here, every op checked, a decoder trained and sampled, fused timed."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

import tilewise
from tilewise import bench, clock
from tilewise.cli import Refusal, main
from tilewise.cli.arguments import named_device, named_ops, positive
from tilewise.cli.bench import draw_ratios, duration
from tilewise.cli.check import Case, chosen_cases, one, summary
from tilewise.cli.console import print_table, with_progress
from tilewise.models.generation import generate
from tilewise.models.run import TrainingRun
from tilewise.models.settings import TrainingSettings
from tilewise.models.text import encode, end_token, stream_text, windows
from tilewise.models.training import Progress, advance, begin

SECONDS = 280.0  # for all of it, on two cores
CHECKED = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
FALL = 0.5  # nats a token by which the validation loss falls at least
TRAINING_SECONDS, FEWEST_STEPS, MOST_STEPS = 75.0, 40, 400
PROMPT = "The "


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of `tilewise demo`."""
    parser.add_argument("--out", metavar="DIR", help="a new folder (runs/demo-<date and time>)")
    parser.add_argument("--steps", type=positive, help="of training (what takes about a minute)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")


def run(arguments: Namespace) -> int:
    """Show it all, at most five minutes; 1 if an op is wrong or the decoder learned nothing."""
    begun = time.monotonic()
    device = named_device(arguments.device)
    folder = Path(arguments.out or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise Refusal(f"--out: must be a new folder, got {folder}: {error.strerror}") from None

    headline("What is on this machine")
    main(["info", "--device", device])
    headline(
        "Every op against its reference in fp64, smallest sizes (`tilewise check` has them all)"
    )
    wrong = check(device)
    headline("A small decoder, trained on the language reference that ships inside Python")
    training = train(folder / "decoder", arguments.steps, device)
    headline("What it has learned to write")
    write(training)
    headline("Fused against plain PyTorch")
    labels, ratios = race(training, device, SECONDS - (time.monotonic() - begun))
    picture = folder / "demo.png"
    draw(training, labels, ratios, picture)

    first, last = (training.history.validation[i][1] for i in (0, -1))
    learned = first - last >= FALL
    print()
    print(f"every op checked: {f'{wrong} outputs are wrong' if wrong else 'all right'}")
    print(
        f"validation loss: {first:.2f} before, {last:.2f} after{'' if learned else ': too little'}"
    )
    print(f"{picture}; the decoder: tilewise generate --checkpoint {training.folder}")
    print(f"{time.monotonic() - begun:.0f} s in all")
    return 0 if learned and not wrong else 1


def headline(text: str) -> None:
    """Print what comes now."""
    print(f"\n== {text}", flush=True)


def check(device: str) -> int:
    """Check the first size of every op; return how many outputs and gradients are wrong."""
    cases: list[Case] = [
        case
        for dtype in CHECKED[device]
        for case in chosen_cases(named_ops([]), None, dtype, quick=True)
        if device in case[0].backends[case[1]].devices
    ]
    results = [
        r for case in with_progress(cases, "checking", len(cases)) for r in one(case, device)
    ]
    print_table("checked", *summary(results))
    return sum(not result.ok for result in results)


def train(folder: Path, steps: int | None, device: str) -> TrainingRun:
    """Train on the embedded text, saying how it goes; without `steps` as far as there is time."""
    settings = TrainingSettings(
        vocab_size=1024, context=96, dim=128, layers=3, heads=4, kv_heads=2, batch=16,
        steps=steps or MOST_STEPS, device=device,
    )  # fmt: skip
    training = begin(settings, folder)
    if steps is None:
        affordable = int(TRAINING_SECONDS / step_seconds(training))
        steps = min(max(affordable, FEWEST_STEPS), MOST_STEPS)
    training.settings = replace(
        training.settings, steps=steps, warmup=min(20, steps),
        evaluate_every=max(1, steps // 8), save_every=steps,
    )  # fmt: skip
    count = sum(p.numel() for p in training.model.parameters())
    print(f"{count:,} parameters, {len(training.corpus.training):,} tokens", flush=True)

    def report(progress: Progress) -> None:
        if progress.validation_loss is not None:
            print(
                f"step {progress.step}/{progress.steps}: validation loss "
                f"{progress.validation_loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )

    advance(training, report)
    return training


def write(training: TrainingRun) -> None:
    """Print a continuation of the prompt as it is drawn."""
    tokenizer, model = training.tokenizer, training.model.eval()
    prompt = torch.tensor([encode(tokenizer, PROMPT)], device=training.device)
    drawn = generate(
        model, prompt, max_tokens=training.settings.context - prompt.shape[1],
        temperature=0.8, top_k=50, top_p=0.95, seed=0, stop_token=end_token(tokenizer),
    )  # fmt: skip
    print(PROMPT, end="")
    for piece in stream_text(tokenizer, map(int, drawn)):
        print(piece, end="", flush=True)
    print()


def race(training: TrainingRun, device: str, seconds: float) -> tuple[list[str], list[float]]:
    """Time the training step and the first workload of every op, ours and PyTorch's.

    Returns:
        What was timed, and how many times faster ours is.
    """
    labels, ratios = ["training step of the decoder"], [step_ratio(training, device)]
    chosen = bench.works(named_ops([]), device, quick=True)
    steps = bench.run(
        chosen, device, [torch.get_num_threads()], compiled=False, seconds_each=0.1, budget=seconds
    )
    report = list(with_progress(steps, "timing", len(chosen)))[-1]
    shown = [row for row in report.rows if row.provider not in bench.PEERS]
    labels += [f"{row.op}, {row.direction}, by {row.provider}" for row in shown]
    ratios += [row.ratio or 0.0 for row in shown]
    rows = [
        [label, f"{ratio:.2f}"] for label, ratio in zip(labels, ratios, strict=True)
    ]  # fmt: skip
    print_table("speed", ["what", "times faster than PyTorch"], rows)
    for work in report.dropped:
        print(f"dropped, for want of time: {work}")
    return labels, ratios


def batch_step(training: TrainingRun, *backends: str) -> None:
    """Loss and gradients of one batch, by the backends that are preferred."""
    settings, model = training.settings, training.model.train()
    inputs, targets = windows(
        training.corpus.training, context=settings.context, seed=1, first=0, count=settings.batch
    )
    with tilewise.backend(*backends):
        model.loss(inputs.to(training.device), targets.to(training.device)).backward()
    model.zero_grad(set_to_none=True)


def step_seconds(training: TrainingRun) -> float:
    """About how long a step takes, once the kernels are there."""
    for _ in range(2):
        begun = time.perf_counter()
        batch_step(training)
        if training.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begun


def step_ratio(training: TrainingRun, device: str) -> float:
    """Loss and gradients of one batch: the time of the references over that of the kernels."""
    calls: dict[str, clock.Call] = {
        "plain": partial(batch_step, training, "reference"),
        "fused": partial(batch_step, training),
    }
    samples = clock.interleaved(calls, device, 2.0)
    plain, fused = (clock.summary(samples[name])["seconds"] for name in ("plain", "fused"))
    print(f"training step: {duration(fused)} fused, {duration(plain)} plain", flush=True)
    return plain / fused


def draw(training: TrainingRun, labels: Sequence[str], ratios: Sequence[float], file: Path) -> None:
    """Write the losses and the speed as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = training.history
    height = 3 + 0.25 * len(labels)
    figure, (losses, speed) = pyplot.subplots(1, 2, figsize=(14, height), layout="constrained")
    losses.plot(range(1, len(history.losses) + 1), history.losses, linewidth=1, label="training")
    losses.plot(*zip(*history.validation, strict=True), marker="o", label="validation")
    losses.set_xlabel("step")
    losses.set_ylabel("loss (nats a token)")
    losses.legend()
    draw_ratios(speed, labels, ratios, ["step", *["op"] * (len(labels) - 1)])
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
