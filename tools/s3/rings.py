"""Writes Swift's three rings, each with one partition on one device. Swift's own Python runs this file.

python rings.py FOLDER DEVICE ACCOUNT_PORT CONTAINER_PORT OBJECT_PORT
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from swift.common.ring import RingBuilder

    folder, device, *ports = sys.argv[1:]
    for name, port in zip(("account", "container", "object"), ports, strict=True):
        builder = RingBuilder(part_power=0, replicas=1, min_part_hours=0)
        place = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": device}
        builder.add_dev({**place, "weight": 1.0, "meta": ""})
        builder.rebalance()
        builder.get_ring().save(str(Path(folder, f"{name}.ring.gz")))


if __name__ == "__main__":
    main()
