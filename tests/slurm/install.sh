#!/bin/bash
# Has this machine what a Slurm of its own takes? Installs what is missing where apt and root are, and says so if not.
set -eu
missing=()
for command in slurmctld slurmd sbatch munged ip nsenter unshare; do
  command -v "$command" >/dev/null || missing+=("$command")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "expected slurmctld, slurmd, sbatch, munged, ip, nsenter and unshare, found no ${missing[*]}; install" \
      "slurm-wlm, munge, iproute2 and util-linux" >&2
    exit 1
  fi
  echo "installing slurm-wlm and munge (no ${missing[*]} here)"
  apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2 util-linux >/tmp/orrery-slurm-install.log 2>&1 \
    || { apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2 util-linux; } \
      >/tmp/orrery-slurm-install.log 2>&1 || { cat /tmp/orrery-slurm-install.log >&2; exit 1; }
fi
if [ "$(id -u)" != 0 ]; then
  echo "expected root, which makes the nodes' network namespaces, got user $(id -un)" >&2
  exit 1
fi
