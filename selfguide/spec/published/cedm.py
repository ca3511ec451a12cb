"""Rethinking cluster-conditioned diffusion models (Adaloglou et al. 2025, WACV, arXiv 2403.00570)."""

from __future__ import annotations

from selfguide.spec.published.row import Row

PAPER = (
    "C-EDM: Rethinking cluster-conditioned diffusion models for label-free image synthesis, "
    "Adaloglou et al., WACV 2025 (2403.00570)"
)
DIFFERS = (
    "fp32 in place of fp16; `engine=zero1_bf16` is as fast, and another run.",
    "At 64 px the learning rate is 2e-4, as in the published script; its table says 1e-3.",
    "Tables 2 and 3 and the searches over K train for 100 million images, table 1 for 200 million.",
)
# table 7's augment probability, by the data that an experiment is named after
_AUGMENTED = {
    "cifar": "augment=edm",
    "ffhq": "augment.probability=0.15",
    "afhq": "augment.probability=0.15",
}
_NAMES = {"fid": "fid_adm", "fdd": "fdd"}
_HALF = "train.images=100_000_768"  # 100 million, whole batches of 1024
_BOTH = "[cedm,cedm_fdd]"
_CLIP = "five prompts that CLIP's authors publish for CIFAR; which five the paper took is not in what we read"
_ADAPT = "our learning rate: the paper prints the 15 epochs alone"
# C-EDM's search, under its bound of 500, 600 and 600: data set, what its shards and its sidecars are called, each K
_TO_600 = (50, 100, 200, 300, 400, 500, 600)
_GRIDS = (
    ("cifar10", "cifar10", "cifar10", _TO_600[:-1]),
    ("cifar100", "cifar100", "cifar100", _TO_600),
    ("ffhq64", "ffhq-64", "ffhq", _TO_600),
)
# clusters that experiments are conditioned on by themselves
_OWN = {("cifar10-temi", 100), ("cifar100-temi", 200), ("cifar100-dino", 200), ("ffhq-temi", 400)}
_BACKBONES = ("mocov3", "dino", "dinov2", "ibot", "clip")


def _row(table: str, name: str, experiment: str | None, *overrides: str, **rest: object) -> Row:
    numbers = {metric: rest.pop(short) for short, metric in _NAMES.items() if short in rest}
    return Row(
        paper="cedm",
        table=table,
        name=name,
        experiment=experiment,
        overrides=(*_augmented(experiment), *overrides),
        numbers=numbers,  # type: ignore[arg-type]
        source=f"C-EDM, {table}, {name}" if numbers else "",
        **rest,  # type: ignore[arg-type]
    )


def _augmented(experiment: str | None) -> tuple[str, ...]:
    """What a row that is a run is augmented by."""
    data = (experiment or "").partition("/")[2]
    return tuple(typed for name, typed in _AUGMENTED.items() if data.startswith(name))


def _clusters(ids: str, groups: int) -> tuple[str, ...]:
    """Other clusters than the experiments' own."""
    if (ids, groups) in _OWN:
        return ()
    return f"guidance.ids=notes/{ids}-k{groups}", f"guidance.groups={groups}"


ROWS = (
    _row("table1", "cifar10-none", "cedm/cifar10_none"),
    _row("table1", "cifar10-temi", "cedm/cifar10_temi", fid=1.67),
    _row("table1", "cifar10-kmeans", "cedm/cifar10_kmeans", fid=1.69),
    _row("table1", "cifar10-oracle", "cedm/cifar10_oracle", fid=2.21),
    _row("table1", "cifar10-labels", "cedm/cifar10_labels"),
    _row("table1", "cifar100-none", "cedm/cifar100_none"),
    _row("table1", "cifar100-temi", "cedm/cifar100_temi", fid=2.17),
    _row("table1", "cifar100-kmeans", "cedm/cifar100_kmeans", fid=2.21),
    _row("table1", "cifar100-oracle", "cedm/cifar100_oracle", fid=2.25),
    _row("table1", "cifar100-labels", "cedm/cifar100_labels"),
    _row("table1", "ffhq64-none", "cedm/ffhq64_none"),
    _row("table1", "ffhq64-temi", "cedm/ffhq64_temi"),
    _row("table1", "ffhq64-kmeans", "cedm/ffhq64_kmeans", fid=1.99),
    _row("table1", "ffhq64-oracle", "cedm/ffhq64_oracle", fid=1.77),
    _row("table1", "ffhq128-none", "cedm/ffhq128_none", fid=5.93),
    _row("table1", "ffhq128-temi", "cedm/ffhq128_temi", fid=4.40),
    _row("table1", "ffhq128-kmeans", "cedm/ffhq128_kmeans"),
    _row("table1", "ffhq128-oracle", "cedm/ffhq128_oracle"),
    _row("table1", "afhq64-none", "cedm/afhq64_none"),
    _row("table1", "afhq64-temi", "cedm/afhq64_temi"),
    _row("table1", "afhq64-kmeans", "cedm/afhq64_kmeans"),
    _row("table1", "afhq64-oracle", "cedm/afhq64_oracle"),
    *(
        _row(
            "figure2",
            f"efficiency-{name}",
            f"cedm/{name}",
            differs="images to reach a score, off the curves on the board",
        )
        for name in ("cifar10_none", "cifar10_temi", "cifar100_none", "cifar100_temi")
    ),
    # CIFAR-100 by K, 100 million images
    _row("table2", "labels-k20", "cedm/cifar100_coarse", _HALF, fid=3.10),
    _row("table2", "labels-k100", "cedm/cifar100_labels", _HALF, fid=2.41),
    *(
        _row(
            "table2",
            f"clip-k{k}",
            "cedm/cifar100_temi",
            *_clusters("cifar100-clip", k),
            _HALF,
            fid=fid,
            differs=_CLIP,
        )
        for k, fid in ((20, 3.38), (100, 2.42))
    ),
    *(
        _row(
            "table2",
            f"{how}-k{k}",
            f"cedm/cifar100_{how}",
            *_clusters(f"cifar100-{ids}", k),
            _HALF,
            fid=fid,
        )
        for how, ids, found in (
            ("kmeans", "dino", (3.09, 2.41, 2.36)),
            ("temi", "temi", (2.93, 2.37, 2.31)),
        )
        for k, fid in zip((20, 100, 200), found, strict=True)
    ),
    # TEMI on DINO as it is, and adapted to the data
    *(
        _row(
            "table3",
            f"{data}-{how}",
            f"cedm/{data}_temi",
            *own,
            _HALF,
            protocol=_BOTH,
            fid=fid,
            fdd=fdd,
            differs=differs,
        )
        for data, k, how, differs, fid, fdd in (
            ("cifar10", 100, "dino", None, 1.73, 153.5),
            ("cifar10", 100, "adapted", _ADAPT, 1.74, 152.8),
            ("cifar100", 200, "dino", None, 2.31, 250.7),
            ("cifar100", 200, "adapted", _ADAPT, 2.39, 250.8),
        )
        for own in [_clusters(f"{data}-temi" if how == "dino" else f"{data}-temi-{how}", k)]
    ),
    *(
        _row(
            "figure3",
            f"{data}-k{k}",
            f"cedm/{data}_temi",
            *_clusters(f"{notes}-temi", k),
            _HALF,
            protocol=_BOTH,
        )
        for data, _, notes, grid in _GRIDS
        for k in grid
    ),
    *(
        _row(
            "figure3",
            f"{data}-bound",
            None,
            command=f"python -m tools.annotate bound data/{shards} --features notes/{notes}-dino "
            f"--out notes/{notes}-bound",
            differs="utilisation over K, and the bound K; with FID of the runs above: python -m tools.correlate groups "
            "fid_adm utilisation --mark K",
        )
        for data, shards, notes, _ in _GRIDS
    ),
    *(
        _row(
            "figure4",
            f"{net}-k{k}",
            "cedm/cifar10_temi",
            *_clusters(f"cifar10-{net}-temi", k),
            _HALF,
        )
        for net in _BACKBONES
        for k in (100, 200, 500)
    ),
    *(
        _row(
            "table4",
            f"lower-bound-{data}",
            None,
            command=f"python -m tools.annotate bound data/{data} --features notes/{features}-dino --beta 1 "
            f"--over 100 200 300 400 500 --out notes/{features}-lower",
            differs=f"{used} clusters in use in the paper, deviation below 6.4 over its K",
        )
        for data, features, used in (
            ("cifar10", "cifar10", 36.4),
            ("ffhq-64", "ffhq", 46.6),
            ("cifar100", "cifar100", 49.4),
        )
    ),
    *(
        _row(
            "appendixC4",
            f"{data}-uniform",
            f"cedm/{data}_temi",
            "evaluation.prior=uniform",
            differs=f"{gap:+.2f} FID in the paper against the data's own frequencies",
        )
        for data, gap in (("cifar10", 0.19), ("cifar100", 0.24))
    ),
    *(
        _row(
            "figure5",
            f"{name}-{k}",
            None,
            command=" ".join(
                (
                    f"python -m launcher.submit experiment=cedm/cifar10_{name}",
                    *(_clusters("cifar10-temi", k) if name == "temi" else ()),
                    f"augment=edm {_HALF} evaluation=cedm_ood evaluation.weights=FILE evaluation.sha256=HEX",
                )
            ),
            differs="FILE and HEX: DINO ViT-B's weights and their sha256; uFID is added by "
            "evaluation.metrics=[ood_auroc,ufid] evaluation.unconditional=NPZ",
        )
        for name, k in (("none", 1), ("temi", 100), ("temi", 500))
    ),
    _row(
        "figure6",
        "fid-against-fdd",
        None,
        command="python -m tools.correlate fid_adm fdd --runs RUNS --figure figure6.png",
        differs="RUNS stands for the folder of the runs of figure3, of one data set at a time",
    ),
    _row(
        "figure7",
        "clusters-and-classes",
        None,
        command="python -m tools.sample RUN --grid runs=RUN,LABELLED --matched 0 1 2 3 4 5 6 7 8 9 --count 10 "
        "--out samples",
        differs="RUN stands for the run of cedm/cifar10_temi, LABELLED for that of cedm/cifar10_labels",
    ),
    _row(
        "figure8",
        "confidence",
        None,
        command="python -m tools.confidence samples/samples.npz data/ffhq-64 notes/ffhq-temi-k400 "
        "--vit vit_base_patch16_224.dino --view temi --beside none/samples.npz",
        differs="of samples that `tools.sample RUN --count 1000 --npz` made of the runs of cedm/ffhq64_temi and "
        "cedm/ffhq64_none; also figure 14",
    ),
    _row(
        "figure9",
        "ffhq-clusters",
        None,
        command="python -m tools.atlas --sidecar notes/ffhq-dino-k400 --shards data/ffhq-64",
    ),
    _row(
        "figure11",
        "one-noise-over-k",
        None,
        command="python -m tools.sample RUN --grid runs=RUN,RUN,RUN --count 8 --out samples",
        differs="RUN, RUN, RUN: runs of figure3, from small to large K, and cedm/cifar10_none",
    ),
    _row(
        "figure15",
        "fid-and-fdd-over-training",
        "cedm/cifar10_temi",
        protocol=_BOTH,
        differs="curves on the board",
    ),
    _row(
        "section4.1",
        "cost-of-clusters",
        None,
        command="python -m tools.annotate temi data/cifar10 --features notes/cifar10-dino --groups 100 "
        "--out notes/cifar10-temi-k100",
        differs="its seconds, ranks and device are `cost` in the sidecar's record; GPU-hours of runs are on the board",
    ),
    _row(
        "section5",
        "other-scores",
        None,
        command="python -m launcher.evaluate RUN "
        "'evaluation.metrics=[precision_recall,density_coverage,inception_score]'",
        differs="RUN stands for any of them; scores that the paper tried beside FID",
    ),
    _row(
        "section5",
        "mss",
        None,
        lacks="MSS, which the paper names among the scores it tried: what we read of it gives neither a definition nor "
        "a number",
    ),
)
