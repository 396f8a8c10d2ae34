#!/usr/bin/env bash
# One run on a Slurm allocation: a head on the first node, one Ray node a machine, the driver on the first.
#
#   sbatch --nodes=3 --gpus-per-node=8 infra/slurm/submit.sh recipe=probe size=paper storage.root=/shared/loom3d \
#       cache.root=/local/loom3d cache=shared cache.remote=/shared/loom3d/features
#
# TRAIN_NODES (default: all but one) nodes hold the workers of whatever role the recipe trains, the others encoders.
# The arguments are overrides of the configuration; storage.root must be on a file system that all nodes share,
# cache.root on each node's own disk.
#SBATCH --job-name=loom3d
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ $# -eq 0 || -z "${SLURM_JOB_ID:-}" ]]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G infra/slurm/submit.sh recipe=... storage.root=/shared/..." >&2
  exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
train_nodes=${TRAIN_NODES:-$(( ${#nodes[@]} > 1 ? ${#nodes[@]} - 1 : 1 ))}
gpus=${SLURM_GPUS_ON_NODE:-0}
port=$(( 20000 + SLURM_JOB_ID % 20000 ))

# A token of this job's own, readable by its user alone: nodes without it cannot join, others cannot submit.
secrets=$(mktemp -d "$PWD/.loom3d-$SLURM_JOB_ID.XXXXXX")
trap 'rm -rf "$secrets"' EXIT
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$secrets/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/token" RAY_USAGE_STATS_ENABLED=0

address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

start_node() {  # node, its roles, further arguments of `ray start`
  local units=$(( gpus > 0 ? gpus : 1 )) offers="" role
  for role in $2; do offers+="${offers:+, }\"role_$role\": $units"; done
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" \
    ray start --block --disable-usage-stats --resources="{$offers}" "${@:3}" &
}

for i in "${!nodes[@]}"; do
  roles=$([[ $i -lt $train_nodes ]] && echo "trainer llm diffusion vlm" || echo feature)
  if [[ $i -eq 0 ]]; then
    start_node "$head" "$roles" --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1
    sleep 20  # the head listens before the others ask for it
  else
    start_node "${nodes[$i]}" "$roles" --address="$address:$port"
  fi
done

# With one node the same machine trains and encodes, in this process's own Ray.
if [[ ${#nodes[@]} -eq 1 ]]; then
  overrides=(service.replicas=0)
else
  overrides=()
fi

# The steps above end with the job; the driver's status is the job's.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  python -m actors train cluster=attach "cluster.address='$address:$port'" "${overrides[@]}" "$@"
