"""What `python -m launcher.submit --help` says, and its completion for bash; both read the YAML tree."""

from __future__ import annotations

import textwrap

from launcher import choices, keys
from shards import cli

WIDTH = 110  # of lines that are wrapped

COMMON = (
    ("cluster=local", "where: auto, local, slurm, devcluster, or a profile your site added"),
    ("nodes=4", "machines; ranks are nodes x cluster.gpus_per_node"),
    ("min_nodes=2", "go on with so few nodes where not all are to be had; the global batch stays"),
    ("cluster.gpus_per_node=8", "ranks per node (processes where there are no GPUs)"),
    (
        "cluster.partition=gpu",
        "Slurm's partition; also cluster.account, cluster.qos, cluster.timeout_min, cluster.restart",
    ),
    ("train.images=512_000", "length of training, in images seen"),
    ("train.batch=256", "global batch; train.micro_batch is what one rank takes at once"),
    ("train.learning_rate=2e-4", "AdamW's"),
    (
        "train.resume=strict",
        "stop where the newest checkpoint is damaged, in place of going on from the one before",
    ),
    (
        "train.checkpoint_store=s3://bucket/runs",
        "a copy of each checkpoint, from which a run whose folder is gone goes on",
    ),
    ("guidance=labels", "where the condition comes from: none, labels, online, sidecar"),
    ("model=dit_b_2", "a row of the table of sizes; model.depth=2 changes one number of it"),
    ("engine=torch", "what takes the optimiser step: torch, or DeepSpeed's zero1"),
    ("data.root=data/mine", "your shards; data.shape and data.classes are those of their manifest"),
    (
        "data.root=s3://bucket/shards",
        "shards; S3 by this shell's AWS_* variables, which jobs inherit, or a profile in ~/.aws",
    ),
    ("data.cache=/local/shards", "a folder on each node's disk that keeps what came from S3"),
    ("evaluation=none", "which protocol scores the snapshots; none: no score"),
    ("seed=1", "another run: everything random follows from it"),
    ("name=first-try", "a name instead of the hash as the run's id"),
    ("runs=/shared/runs", "where run folders are, on a file system all nodes see"),
    ("follow=true", "stay and show progress; Ctrl-C stops showing, not training"),
    ("dry_run=true", "show config, batch script and memory; touch nothing"),
)


def text() -> str:
    """The help page."""
    lines = [
        f"usage: {cli.program('launcher.submit')} experiment=NAME [key=value ...] [-m] [option ...]",
        "",
        "Composes an experiment, checks everything, and submits its training and its evaluation to this machine",
        "or to Slurm; returns at once. The same command again joins the run, or resumes it where it stopped;",
        "python -m launcher.resume RUN does so by the run's own config, and extends it with train.images=N.",
        "",
        "experiments:",
        *(f"  experiment={name:<16} {line}" for name, line in choices.experiments().items()),
        "  experiment=PAPER/NAME       what the tables of four papers are made of: python -m tools.reproduce ls",
        "",
        "common settings, by example:",
        *(f"  {example:<30} {line}" for example, line in COMMON),
        "",
        "choices:",
        *(_choices(group) for group in choices.GROUPS[1:]),
        "",
        "options:",
        "  -m                             a sweep, a run for each value: -m seed=0,1,2 model.depth=range(4,8); several",
        "                                 lists mean their product; again starts only what failed or is missing",
        "  --config-dir DIR               your DIR/experiment/NAME.yaml, DIR/data/NAME.yaml, ..., searched first;",
        "                                 SELFGUIDE_CONFIGS names several such folders, with ':' between two",
        "  --json                         one JSON object on stdout instead of text",
        '  --completion bash              print a completion script: eval "$(python -m launcher.submit '
        '--completion bash)"',
        "  --help                         this page",
        "",
        "Any field of the configuration can be set; dry_run=true prints them all. Exit codes: 0 submitted, joined or",
        "finished, 1 a followed run failed, 2 a mistake in the settings.",
    ]
    return "\n".join(lines)


_BASH = """\
_selfguide_submit() {{
    local line="${{COMP_LINE:0:COMP_POINT}}"
    [[ $line == *"-m launcher.submit "* ]] || return 0
    local word="${{line##* }}"
    COMPREPLY=($(compgen -W "{words}" -- "$word"))
    # bash takes '=' for the end of a word, so only what follows it is completed
    [[ $word != *=* ]] || COMPREPLY=("${{COMPREPLY[@]#"${{word%%=*}}="}}")
}}
complete -o default -o nospace -F _selfguide_submit python python3
"""


def _choices(group: str) -> str:
    """A group and its choices, on as many lines as they need."""
    listed = ", ".join(choices.options(group))
    return textwrap.fill(
        listed,
        WIDTH,
        initial_indent=f"  {group:<11} ",
        subsequent_indent=" " * 14,
        break_on_hyphens=False,
    )


def completion() -> str:
    """A bash function that completes groups with their choices and every key."""
    words = [f"{group}={option}" for group in choices.GROUPS for option in choices.options(group)]
    words += [f"{key}=" for key in keys.known_keys() if key not in choices.GROUPS]
    return _BASH.format(words=" ".join(words))


def complete_setting(prefix: str) -> list[str]:
    """What `prefix` of one `key=value` may become: groups and keys, or listed values behind `=`."""
    key, equals, _typed = prefix.partition("=")
    if not equals:
        return [
            f"{name}=" for name in (*choices.GROUPS, *keys.known_keys()) if name.startswith(key)
        ]
    return [f"{key}={value}" for value in choices.values(key)]
