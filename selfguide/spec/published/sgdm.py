"""Self-Guided Diffusion Models (Hu et al. 2023, CVPR, arXiv 2210.06462)."""

from __future__ import annotations

from selfguide.spec.published.row import Row

PAPER = "SGDM: Self-Guided Diffusion Models, Hu et al., CVPR 2023 (2210.06462)"
DIFFERS = (
    "Training and sampling are those of the published code (`path=ddpm_quad`, `sampler=ddim_sgdm`), whose betas its "
    "text calls linear.",
    "VOC and COCO are stored as centre crops of 64 px, where the paper takes random ones of a larger image.",
    "FID is ADM's evaluator's, of 10,000 samples against 10,000 training images.",
    "The paper prints the best of every tenth epoch by FID against training images; here each of these snapshots has "
    "its row on the board, and `python -m tools.best RUN` writes down which one that is, with the last one beside it.",
    "Of ImageNet-100 and churches the number of clusters is not printed: 1,000 and 100 are ours.",
)
_NAMES = {"fid": "fid_adm", "is_": "inception_score", "p": "precision", "r": "recall"}
_LARGEST = "of several objects the box of the largest, as LOST finds one"


def _row(table: str, name: str, experiment: str | None, *overrides: str, **rest: object) -> Row:
    numbers = {metric: rest.pop(short) for short, metric in _NAMES.items() if short in rest}
    return Row(
        paper="sgdm",
        table=table,
        name=name,
        experiment=experiment,
        overrides=overrides,
        numbers=numbers,  # type: ignore[arg-type]
        source=f"SGDM, {table}, {name}" if numbers else "",
        **rest,  # type: ignore[arg-type]
    )


def _clusters(ids: str, groups: int) -> tuple[str, str]:
    return f"guidance.ids=notes/{ids}", f"guidance.groups={groups}"


_SHORT = "train.images=25_623_296"  # 20 epochs
_VOC_LABELS, _VOC_NONE = {"fid": 23.5}, {"fid": 58.6}

ROWS = (
    # backbones at 10,000 clusters, ImageNet at 32 px, 20 epochs
    *(
        _row(
            "table1",
            name,
            "sgdm/in32_self",
            *_clusters(f"in32-{name}-k10000", 10_000),
            _SHORT,
            fid=fid,
            is_=score,
        )
        for name, fid, score in (
            ("resnet50", 22.00, 8.23),
            ("vit-b", 22.30, 7.81),
            ("mae", 32.58, 8.20),
            ("simclr", 23.16, 9.35),
            ("msn", 21.16, 10.59),
            ("dino", 19.35, 10.41),
        )
    ),
    # K, ImageNet at 32 px, 20 epochs
    _row("figure2", "labels", "sgdm/in32_labels", _SHORT, fid=17.9, is_=9.94),
    _row("figure2", "k1", "sgdm/in32_none", _SHORT, differs="one cluster is no condition"),
    *(
        _row(
            "figure2",
            f"k{groups}",
            "sgdm/in32_self",
            *_clusters(f"in32-dino-k{groups}", groups),
            _SHORT,
            **({"fid": 16.4, "is_": 10.35} if groups == 5000 else {}),
        )
        for groups in (10, 100, 500, 1000, 5000)
    ),
    _row(
        "figure2",
        "k10000",
        None,
        command="python -m tools.reproduce sgdm table1 dino",
        differs="the run of that row",
    ),
    # CIFAR-100, 400 clusters: the share of images with another one's id
    _row("figure3", "labels", "sgdm/cifar100_labels"),
    _row("figure3", "shuffle0", "sgdm/cifar100_self"),
    *(
        _row("figure3", f"shuffle{share}", "sgdm/cifar100_self", f"guidance.shuffle={share / 100}")
        for share in (25, 50, 75, 100)
    ),
    _row("figure4", "hours-labels", "sgdm/in32_labels", differs="FID over GPU-hours on the board"),
    _row("figure4", "hours-self", "sgdm/in32_self", differs="FID over GPU-hours on the board"),
    _row("table2", "in32-labels", "sgdm/in32_labels", fid=9.2, is_=19.0, p=0.71, r=0.62),
    _row("table2", "in32-none", "sgdm/in32_none", fid=14.3, is_=10.8, p=0.49, r=0.61),
    _row("table2", "in32-self", "sgdm/in32_self", fid=7.3, is_=20.3, p=0.77, r=0.63),
    _row("table2", "in64-labels", "sgdm/in64_labels", fid=16.8, is_=18.6, p=0.71, r=0.62),
    _row("table2", "in64-none", "sgdm/in64_none", fid=36.1, is_=10.4, p=0.59, r=0.60),
    _row("table2", "in64-self", "sgdm/in64_self", fid=12.1, is_=23.1, p=0.78, r=0.62),
    _row("table3", "in100-labels", "sgdm/in100_labels", fid=21.2, is_=64.1),
    _row("table3", "in100-none", "sgdm/in100_none", fid=42.1, is_=41.1),
    _row("table3", "in100-self", "sgdm/in100_self", fid=16.1, is_=78.3),
    _row("table3", "churches-none", "sgdm/churches_none", fid=19.2),
    _row("table3", "churches-self", "sgdm/churches_self", fid=15.2),
    # the same two at the end of a shorter training
    _row(
        "appendixA1",
        "churches-none",
        None,
        lacks="the length of this training is not printed; table3 has the runs (23.1 there)",
    ),
    _row(
        "appendixA1",
        "churches-self",
        None,
        lacks="the length of this training is not printed; table3 has the runs (16.2 there)",
    ),
    _row("table4", "voc-labels", "sgdm/voc_labels", **_VOC_LABELS),
    _row("table4", "voc-none", "sgdm/voc_none", **_VOC_NONE),
    _row("table4", "voc-boxed", "sgdm/voc_boxed", fid=18.4),
    _row("table4", "voc-boxes", "sgdm/voc_boxes", fid=13.2, differs=_LARGEST),
    _row("table4", "coco20k-labels", "sgdm/coco20k_labels", fid=19.3),
    _row("table4", "coco20k-none", "sgdm/coco20k_none", fid=42.5),
    _row("table4", "coco20k-boxed", "sgdm/coco20k_boxed", fid=16.0),
    _row("table4", "coco20k-boxes", "sgdm/coco20k_boxes", fid=9.6, differs=_LARGEST),
    _row("table5", "voc-labels", "sgdm/voc_labels", **_VOC_LABELS),
    _row("table5", "voc-none", "sgdm/voc_none", **_VOC_NONE),
    _row("table5", "voc-segmented", "sgdm/voc_segmented", fid=17.1),
    _row("table5", "voc-masks", "sgdm/voc_masks", fid=12.5),
    *(
        _row(
            "table5",
            f"stuff-{name}-{split}",
            f"sgdm/stuff_{name}",
            protocol=protocol,
            fid=fid,
        )
        for name, train, val in (
            ("labels", 16.3, 20.5),
            ("none", 29.1, 34.1),
            ("segmented", 12.5, 17.7),
            ("masks", 8.1, 11.2),
        )
        for split, protocol, fid in (("train", "sgdm", train), ("val", "sgdm_val", val))
    ),
    *(
        _row(
            "table7",
            f"k{groups}",
            "sgdm/voc_boxed",
            *_clusters(f"voc-dino-k{groups}", groups),
            fid=fid,
        )
        for groups, fid in ((21, 22.5), (50, 18.6), (100, 18.5))
    ),
    _row(
        "figure9",
        "nmi-against-fid",
        None,
        command="python -m tools.correlate nmi fid_adm --runs RUNS --figure figure9.png",
        differs="RUNS stands for the folder of the runs of table1",
    ),
    _row(
        "figure6",
        "signals-beside-samples",
        None,
        command="python -m tools.sample RUN --row 1 2 3 --count 18 --beside --shards data/coco-stuff-64-val "
        "--annotations layout=notes/stuff-val-stego --out samples",
        differs="RUN stands for the run of sgdm/stuff_segmented; without --shards and --annotations training images; "
        "figures 7, 15, 17 and 19 are others of its kind",
    ),
    *(
        _row(
            "figure10",
            f"strength-{name}",
            None,
            command="python -m launcher.evaluate RUN sampler.g=0,0.5,1,1.5,2,2.5,3",
            differs=f"RUN stands for the run of sgdm/in32_{name}",
        )
        for name in ("labels", "self")
    ),
    *(
        _row(
            "figure10",
            f"unbalanced-{name}",
            f"sgdm/in32_{name}",
            "evaluation.shards=data/in32-val-unbalanced",
            differs="class c keeps floor(c / 20) of its 50 validation images",
        )
        for name in ("labels", "self")
    ),
    _row(
        "figure11",
        "loss-and-fid",
        None,
        command="python -m launcher.board curve RUN --metric loss",
        differs="RUN stands for the run of sgdm/in32_self",
    ),
    _row(
        "figure13",
        "named-clusters",
        None,
        command="python -m tools.atlas RUN",
        differs="names stand in groups.yaml of the run",
    ),
    _row(
        "figure16",
        "denoising",
        None,
        command="python -m tools.sample RUN --chain --g 2 --out samples",
        differs="and again with --g 0",
    ),
    _row(
        "figure18",
        "strength-in-one-noise",
        None,
        command="python -m tools.sample RUN --row 1 2 3 --grid g=0,0.43,0.86,1.29,1.71,2.14,2.57,3 --out samples",
        differs="RUN stands for the run of sgdm/stuff_segmented; a line has one noise and one training image's mask",
    ),
    _row(
        "figure22",
        "nearest-reals",
        None,
        command="python -m tools.neighbours samples/images data/in32 --protocol fd_timm --net resnet50 "
        "--weights simclr.safetensors --sha256 HEX",
        differs="of samples that tools.sample made of the run of sgdm/in32_self; in pixels without --protocol and what "
        "is behind it; real images alone stand beside each sample",
    ),
    _row(
        "figure25",
        "between-signals",
        None,
        command="python -m tools.sample RUN --between 3 7 --count 8 --out samples",
        differs="one-hot ids, prototypes and features on the sphere; ids of a DiT or U-ViT, which read the mean of "
        "rows, in proportion",
    ),
    _row(
        "figure26",
        "real-clusters",
        None,
        command="python -m tools.atlas --sidecar notes/in32-dino-k5000 --shards data/in32",
    ),
    _row(
        "figure26",
        "lost-boxes",
        None,
        command="python -m tools.annotate lost data/coco20k-64 --vit vit_small_patch16_224.dino --short 224 "
        "--out notes/coco20k-lost",
        differs="box.png in its folder shows 32 images with their boxes",
    ),
)
