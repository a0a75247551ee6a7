#!/usr/bin/env bash
# Runs a command in a clone of this checkout, on a machine as a user may have it: Debian
# 13 with its Python, make and git, and no CUDA.
# usage: fresh_machine.sh COMMAND...      such as fresh_machine.sh make train
# The machine is a directory, $FRESH_MACHINE, which is kept. Needs root, and Debian's
# packages; exits with 77 where it cannot be made.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
root=${FRESH_MACHINE:-/var/tmp/dropit-jax-debian13}

cannot() {
  echo "NOT TESTED on a fresh machine: $*" >&2
  exit 77
}

[ "$(id -u)" = 0 ] || cannot "that takes root"
if [ ! -d "$root" ]; then
  command -v debootstrap >/dev/null || {
    apt-get update && apt-get install --yes debootstrap
  } >/dev/null 2>&1 || cannot "there is no debootstrap, and no package of it"
  rm -rf "$root.half"
  debootstrap --variant=minbase --include=python3,python3-venv,make,git,ca-certificates \
    trixie "$root.half" >/dev/null || cannot "debootstrap failed"
  mv "$root.half" "$root"
fi
# How names are found, and whom to trust, are the network's.
cp /etc/resolv.conf /etc/hosts "$root/etc/"
rm -rf "$root/etc/ssl/certs"
cp -rL /etc/ssl/certs "$root/etc/ssl/"
mountpoint -q "$root/proc" || mount --bind /proc "$root/proc"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
trap 'umount "$root/proc" "$root/dev"' EXIT
rm -rf "$root/work"
git clone --quiet "$checkout" "$root/work"
env --ignore-environment HOME=/root PATH=/usr/bin:/bin LANG=C.UTF-8 \
  ${PIP_CERT:+PIP_CERT="$PIP_CERT"} ${HTTPS_PROXY:+HTTPS_PROXY="$HTTPS_PROXY"} \
  "$(command -v chroot)" "$root" sh -c 'cd /work && exec "$@"' sh "$@"
