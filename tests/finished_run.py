"""A finished run without a model: every artefact that a report reads, made by the code that makes it in a real run.

Values are drawn, but races, verdicts, surfaces and selections are those of the program, so the folder is one that it
could have left. Data files, pictures, ids and reasons hold text that would harm a page.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image

from datalloy.bakeoff import make_arms, race
from datalloy.calibration import TrainedMixtures, calibrate, interaction_scale
from datalloy.config import Select, load_recipe
from datalloy.mergeability import Expert, diagnose
from datalloy.mixture import Evaluated, Mixture, Spent, write_candidates
from datalloy.objective import Objective
from datalloy.run import Run, write_json
from datalloy.scores import Scores
from datalloy.selection import select
from datalloy.simplex import Simplex
from datalloy.surface import describe_surface
from datalloy.uncertainty import Interval
from datalloy.verdict import Confirmation, judge

HOSTILE = "</script></td><img src=x onerror=alert(1)>\u202egnp.exe\x1b[31m' \" & {{7*7}}{0}%s"
TARGETS, ITEMS, PROBES = ("goal", "aim"), 12, 8


def finish_run(
    root: Path,
    *,
    domains: Sequence[str] = ("chart", "counting", "table"),
    rows: int = 30,
    mixture: bool = True,
    selection: bool = True,
    signed: bool = True,
    bakeoff: bool = True,
    gain: float = 0.05,
    name: str = "run",
) -> Path:
    """The run folder `root/name`; its data lie in `root/data`. `gain`: of the advised model over all others."""
    data = _draw_data(root / "data", domains, rows)
    recipe_path = root / "recipe.yaml"
    recipe_path.write_text(_recipe(data, domains, mixture=mixture))
    with Run(load_recipe(recipe_path), root / name) as run:
        status = {"complete": True, "counts": _counts(domains, rows), "kept": rows * len(domains) // 2, "metrics": {}}
        _write_rejects(run, data)
        write_json(run.path("check.json"), status["counts"])
        if selection:
            _write_selection(run, domains, rows, signed=signed, bakeoff=bakeoff)
        if mixture:
            status["mixture"] = _write_mixture(run, domains)
        _write_models(run, mixture=mixture, gain=gain)
        write_json(run.path("status.json"), status)
        return run.folder


def _recipe(data: Path, domains: Sequence[str], *, mixture: bool) -> str:
    lines = ["name: drawn", "base: tiny", "domains:"]
    lines += [f"  {name}: {{path: {json.dumps(f'{data / name}.jsonl')}}}" for name in domains]
    lines += ["targets:", *(f"  {name}: {{path: {json.dumps(f'{data / name}.jsonl')}}}" for name in TARGETS)]
    lines += ["evaluation:", f"  holdout: {{path: {json.dumps(f'{data}/holdout.jsonl')}}}", "score: {method: auto}"]
    return "\n".join([*lines, *(["mixture: {verify_runs: 2}"] if mixture else [])]) + "\n"


def _draw_data(data: Path, domains: Sequence[str], rows: int) -> Path:
    data.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (64, 64), "navy").save(data / "drawn.png")
    for name in (*domains, *TARGETS, "holdout"):
        count = rows if name in domains else ITEMS
        records = [_record(name, number) for number in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return data


def _record(name: str, number: int) -> dict:
    text = [
        {"role": "user", "content": f"<image>{name} {number}? {HOSTILE}"},
        {"role": "assistant", "content": f"answer {number} {HOSTILE}"},
    ]
    return {"id": sample_id(name, number), "images": ["drawn.png"], "messages": text}


def sample_id(name: str, number: int) -> str:
    return f"{name}-{number:04d}<b onmouseover=alert(2)>"


def _counts(domains: Sequence[str], rows: int) -> dict:
    return {
        "domains": dict.fromkeys(domains, rows),
        "targets": dict.fromkeys(TARGETS, ITEMS),
        "evaluation": {"holdout": ITEMS},
        "rejected": 3,
        "rejected_by_reason": {"leak": 1, "unreadable_image": 2},
        "rejected_by_file": {},
        "read": {},
        "duplicates": {"exact": 1, "near": 4},
    }


def _write_rejects(run: Run, data: Path) -> None:
    where = {"path": str(data / f"{HOSTILE[:20]}.jsonl"), "row": 4, "line": 5, "id": sample_id("lost", 1)}
    reasons = ("leak", "unreadable_image", "unreadable_image")
    lines = [json.dumps({**where, "reason": reason, "detail": HOSTILE}) for reason in reasons]
    run.path("rejected.jsonl").write_text("\n".join(lines) + "\n")


def _write_selection(run: Run, domains: Sequence[str], rows: int, *, signed: bool, bakeoff: bool) -> None:
    random = np.random.default_rng(0)
    count = rows * len(domains)
    utility_NG = random.normal(-0.2, 1, (count, len(TARGETS))) ** 3 if signed else np.zeros((count, len(TARGETS)))
    about = {"agreement_with_exact": {"spearman": 0.9, "interval": [0.8, 0.95], "probes": PROBES}}
    scan = {"step": 0.1, "multiple": 1, "negative_fraction": 0.5, "median_utility": -0.1, "effect": 2.0}
    scan |= {"half_agreement": 0.9, "smallest_step_agreement": 0.5}
    about |= {"step": 0.1, "noise_floor": 1e-8, "harm_below": -1.0}
    about |= {"step_scans": {"exact": {"rows": [scan], "chosen": 0.1, "reason": "it is visible"}}}
    table = Scores.from_columns(
        id=[sample_id(name, number) for name in domains for number in range(rows)],
        domain=np.repeat(domains, rows),
        supervised_tokens=random.integers(1, 20, count),
        length_tokens=random.integers(20, 90, count),
        loss=random.exponential(size=count),
        utility=utility_NG.mean(axis=1),
        utility_by_target=dict(zip(TARGETS, utility_NG.T, strict=True)),
        utility_se=np.full(count, 0.2 if signed else np.nan),
        state=["ok"] * count,
        metadata={"method": "calibrated", "signed": True, **about} if signed else {"method": "loss", "signed": False},
    )
    method = table.metadata["method"]
    run.path("scores").mkdir(exist_ok=True)
    table.write(run.path(f"scores/{method}.parquet"))
    table.write(run.path("scores.parquet"))
    table = Scores.read(run.path("scores.parquet"))
    if signed:
        _write_probes(run, table)
    for number in range(3):
        run.commit(f"scores/{method}/{number:05d}", [], {"seconds": 2.0})
    outcome = _bakeoff(run) if bakeoff else None
    arm = outcome["winner"] if outcome else {"scorer": "low_loss", "fraction": 0.5, "within": "domain"}
    ranked = table.with_utility(-table.loss, table.state, {"method": "low_loss", "signed": False})
    chosen = select(ranked, Select(within=arm["within"]), fraction=arm["fraction"])
    chosen.with_metadata({**chosen.metadata, "arm": arm, "bakeoff": outcome}).write(run.path("selection.parquet"))


def _write_probes(run: Run, table: Scores) -> None:
    fall_NV = np.random.default_rng(1).normal(size=(PROBES, len(TARGETS) * ITEMS))
    np.savez(run.path("probes.npz"), fall_NV=fall_NV, utility_N=fall_NV.mean(axis=1))
    samples = [[table.domain[row], table.id[row]] for row in range(PROBES)]
    items = [[name, sample_id(name, number)] for name in TARGETS for number in range(ITEMS)]
    write_json(run.path("probes.json"), {"samples": samples, "items": items})
    run.commit("probes", [], {"seconds": 4.0, "steps": {"exact": 0.1}})


def _bakeoff(run: Run) -> dict:
    random = np.random.default_rng(2)
    items_V = random.normal(size=ITEMS)
    worth = {"low_loss": 0.3, "calibrated": 0.2, "random": 0.1, "full": 0.0}

    def run_arm(arm, steps, number):
        run.commit(f"bakeoff/{number}-{arm.name}", [], {"steps": steps, "values": [], "seconds": 0.5})
        return items_V + worth[arm.scorer] * arm.fraction * steps / 30 + random.normal(0, 0.05, ITEMS)

    arms = make_arms(("calibrated", "low_loss"), (0.3, 0.5, 0.7))
    weight_V = np.full(ITEMS, 1 / ITEMS)
    outcome = race(arms, run_arm, base_V=items_V - 0.1, weight_V=weight_V, budget_steps=900, longest_steps=200, seed=0)
    return asdict(outcome)


# --- the mixture ------------------------------------------------------------------------------------------------------


def _surface(weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first domain helps the first target, the second the other; all else is useless."""
    value_MG = np.stack([np.sqrt(weight_MK[:, 0]), np.sqrt(weight_MK[:, min(1, weight_MK.shape[1] - 1)])], axis=1)
    return 0.4 + 0.3 * value_MG, np.full(value_MG.shape, 0.005)


def _write_mixture(run: Run, domains: Sequence[str]) -> dict:
    run.path("mixture").mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    count = len(domains)
    uniform_K = np.full(count, 1 / count)
    pick_K = uniform_K.copy()
    pick_K[:2] += 0.5 * uniform_K[2:].sum() / 2
    pick_K[2:] *= 0.5
    weight_NK = np.vstack([np.eye(count), pick_K, *([uniform_K] if count > 2 else [np.array([0.7, 0.3])])])
    noise_V = random.normal(0, 0.1, 2 * ITEMS)
    target_V = np.repeat([0, 1], ITEMS)
    merged_NV = _surface(weight_NK)[0][:, target_V] + noise_V
    true_NV = merged_NV + 0.02 * (1 - (weight_NK**2).sum(axis=1))[:, None]
    true_NV[count:] += random.normal(0, 0.02, (len(weight_NK) - count, 2 * ITEMS))
    trained = TrainedMixtures(TARGETS, weight_NK, true_NV, merged_NV, target_V, np.zeros(2))
    calibration = calibrate(_surface, trained, interaction_scale(trained.merged_NG))
    objective = Objective("mean", np.array([0.5, 0.5]), np.zeros(2), np.full(2, np.inf))
    simplex = Simplex.free(tuple(domains))
    again_RV = random.normal(0, 0.01, (2, 2 * ITEMS))
    verdict = judge(
        trained,
        calibration,
        objective,
        pick_K=pick_K,
        uniform_K=uniform_K,
        size_K=uniform_K,
        confidence=0.95,
        seed=0,
        confirmation=Confirmation(noise_V + 0.05 + again_RV, noise_V + again_RV[::-1], target_V),
    )
    named = dict(zip(domains, pick_K.tolist(), strict=True))
    advice = Mixture.judged(
        named,
        {name: Interval(0.5 * share, 0.5 + 0.5 * share) for name, share in named.items()},
        verdict,
        searched=named,
        objective="mean",
        metric="probability",
        judged_by="marks and probability",
        spent=Spent(3, 2, 2),
    )
    advice.write(run.path("mixture/mixture.json"))
    drawn = describe_surface(calibration, trained, objective, simplex, pick_K, confidence=0.95, seed=0)
    write_json(run.path("mixture/surface.json"), drawn)
    rows = [Evaluated(stage, pick_K, np.array([0.6, 0.5]) + 0.01 * n, np.full(2, 0.02), 24) for n, stage in STAGES]
    write_candidates(run.path("mixture/candidates.parquet"), tuple(domains), TARGETS, rows)
    experts = [Expert(name, 10, [1.0, 1.2, 0.9], [0.8, 1.1, 0.95]) for name in domains]
    gram_KK = np.full((count, count), 0.01) + np.eye(count)
    write_json(run.path("mixture/mergeability.json"), asdict(diagnose(experts, gram_KK, base_norm=5.0)))
    facts = {"steps": 10, "seconds": 3.0, "losses": [1.0, 0.5]}
    for name in domains:
        run.commit(f"experts/{name}", [], facts)
    for number, weight_K in enumerate(weight_NK[count:]):
        weights = dict(zip(domains, weight_K.tolist(), strict=True))
        run.commit(f"mixture/runs/{number}", [], {**facts, "seconds": 3.5 + number, "weights": weights})
        run.commit(f"mixture/runs/{number}/values", [], {"values": [], "seconds": 0.1})
    for name in ("0-1", "1-1"):
        run.commit(f"mixture/confirm/{name}", [], {**facts, "weights": named})
    run.commit("mixture/merged/slopes-0", [], {"losses": [0.1], "seconds": 0.2})
    stability = [{"fraction": 0.5, "weights": named, "moved": 0.1, "spearman": 0.8}]
    run.commit(
        "mixture/search", [], {"weights": named, "stability": stability, "mixmin": {"weights": named, "apart": 0.2}}
    )
    return advice.to_json()


STAGES = tuple(enumerate(("slopes", "slopes", "confirm")))


# --- models -----------------------------------------------------------------------------------------------------------


def _write_models(run: Run, *, mixture: bool, gain: float) -> None:
    random = np.random.default_rng(4)
    run.path("evaluation").mkdir(exist_ok=True)
    easy_V = random.random(ITEMS) * 0.6
    for name in ("base", "model", *(["uniform"] if mixture else []), "full SFT"):
        value_V = np.clip(easy_V + (gain if name == "model" else 0) + random.normal(0, 0.01, ITEMS), 0, 1)
        mark = {"metric": "exact_match", "mean": float(value_V.mean()), "interval": [0.3, 0.5], "items": ITEMS}
        sets = {key: {**mark, "values": value_V.tolist()} for key in (*TARGETS, "holdout")}
        write_json(run.path(f"evaluation/{name}.json"), sets)
        run.commit(f"evaluation/{name}", [], {"seconds": 1.0})
    run.commit("proxy", [], {"steps": 4, "seconds": 1.0, "samples": 5})
    run.commit("model", [], {"steps": 10, "seconds": 9.0, "losses": [1.0, 0.4], "kept": 20, "samples_seen": 80})
    run.path("model").mkdir(exist_ok=True)
