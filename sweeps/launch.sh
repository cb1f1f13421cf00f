#!/bin/bash
# One trial of a W&B sweep: what `wandb agent` starts (the `command` of the sweep files), with the trial's settings as one JSON
# argument. LIT_VLM_LAUNCH says how it starts:
#   (nothing)                    python run.py, which starts trainer.devices processes on this machine
#   "torchrun --nproc-per-node 8 ..."
#   "srun --kill-on-bad-exit=1"  one process for each task of the allocation (sweeps/agent.sbatch)
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An activated environment, else the one of `make setup`
python=python
[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
run=("$root/run.py" task=train logger.wandb=true "$@")
read -ra launch <<<"${LIT_VLM_LAUNCH:-}"
case "${launch[0]:-}" in
  "") exec "$python" "${run[@]}" ;;
  torchrun) exec "$python" -m torch.distributed.run "${launch[@]:1}" "${run[@]}" ;;
esac
# srun answers SIGTERM, by which an agent stops a trial, by killing its tasks; SIGUSR2 it hands on to them, and they save. A signal
# that comes before Python listens would end them, so they begin deaf to it.
"${launch[@]}" bash -c 'trap "" USR1 USR2; exec "$0" "$@"' "$python" "${run[@]}" &
step=$!
trap 'kill -USR2 $step' TERM INT USR1 USR2
while :; do
  wait $step
  code=$?
  kill -0 $step 2>/dev/null || exit $code
done
