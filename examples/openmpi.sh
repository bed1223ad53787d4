#!/bin/bash
# examples/openmpi.sh host1:4,host2:4: four processes on each host; the first host is the rendezvous host.
set -euo pipefail
hosts=${1:?"hosts, such as host1:4,host2:4"}
first=${hosts%%[:,]*}

mpirun --host "$hosts" -x MASTER_ADDR="$first" python examples/plain_pytorch.py --algorithm bytegrad
