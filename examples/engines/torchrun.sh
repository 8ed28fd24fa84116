#!/usr/bin/env bash
# Several machines by torchrun: run this on each of them, with the same words behind it but for the first.
#
#   examples/engines/torchrun.sh 0 FIRST --config examples/configs/coco_resnet50.yaml --data.root FOLDER     # on FIRST
#   examples/engines/torchrun.sh 1 FIRST --config examples/configs/coco_resnet50.yaml --data.root FOLDER     # on the other
#
# FIRST is the name or address of the first machine. NODES, DEVICES (a machine) and PORT are taken from the environment.
# The run has one folder, on the first machine, which alone writes: it has to see the disk that the run shall lie on, and
# a machine that goes on with `--resume RUN` has to see the run.
set -euo pipefail

node=$1 first=$2
shift 2
nodes=${NODES:-2} devices=${DEVICES:-4}

exec torchrun --nnodes "$nodes" --nproc_per_node "$devices" --node_rank "$node" \
  --master_addr "$first" --master_port "${PORT:-29500}" \
  -m mlssl.cli fit "$@" \
  --trainer.num_nodes "$nodes" --trainer.devices "$devices" --trainer.strategy ddp
