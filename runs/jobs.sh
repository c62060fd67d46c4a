# Sourced by the recipes beside it: commands side by side, JOBS at once (default 1, for one 8 GB card), spread over all GPUs,
# or over those of CUDA_VISIBLE_DEVICES.
#   job LOG COMMAND...   start a command when a place is free; its output goes to LOG
#   finish               wait for all; exit 1 and show the log's end where one failed
: "${JOBS:=1}"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TQDM_MININTERVAL=30
present=$({ nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true; } | paste -sd,)
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$present}"
started=0 failed=0
declare -A log_of=()
reap() {  # wait for one job
  local pid code=0
  wait -n -p pid || code=$?
  if [ "$code" -ne 0 ]; then
    failed=1; echo "FAILED ($code): ${log_of[$pid]}" >&2
    tr '\r' '\n' < "${log_of[$pid]}" | grep -v 'it/s\|s/it' | tail -5 >&2
  fi
  unset "log_of[$pid]"
}
job() {
  local log=$1; shift
  while [ "${#log_of[@]}" -ge "$JOBS" ]; do reap; done
  mkdir -p "$(dirname "$log")"
  if [ "${#gpus[@]}" -gt 1 ]; then
    CUDA_VISIBLE_DEVICES=${gpus[started % ${#gpus[@]}]} "$@" > "$log" 2>&1 &
  else
    "$@" > "$log" 2>&1 &
  fi
  log_of[$!]=$log; started=$((started + 1))
}
finish() {
  while [ "${#log_of[@]}" -gt 0 ]; do reap; done
  [ "$failed" -eq 0 ]
}
