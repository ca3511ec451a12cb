"""What a model gains by the condition that it is given, at equal images, and where in a model groups are.

    python -m tools.study run                       every arm, three seeds each; then the report
    python -m tools.study run --quick               one seed
    python -m tools.study report                    of what has finished
    python -m tools.study headline                  label-free at its best guidance against labels at theirs
    python -m tools.study compare                   digits_dit beside its floor and its ceiling; --data emoji: emoji_dit
    python -m tools.study layers data/digits RUN    NMI of k-means over layer, noise-time and pooling

What is trained goes through the launcher as one sweep, and what is measured is kept, so that the same command goes on
where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shards import cli
from tools import verbs

VERBS = {
    "run": "train every arm at equal images, measure, and write the report",
    "report": "the report, of the runs that have finished",
    "headline": "label-free at its best guidance against human labels at theirs",
    "compare": "a model of its own groups beside its floor and its ceiling",
    "layers": "NMI of k-means with labels, over layer, noise-time and pooling",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    # the study of layers was the whole command once
    if words and words[0] not in (*VERBS, "-h", "--help"):
        words = ["layers", *words]
    options = verbs.parse("tools.study", __doc__, VERBS, words)
    return options.run(options)


if __name__ == "__main__":
    cli.run(main)
