#!/bin/sh
# What the two hosts of `make test-multinode` need of Debian; says so and goes on where it cannot be installed.
set -eu
missing=""
command -v ip >/dev/null 2>&1 || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
[ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
command -v pdsh >/dev/null 2>&1 || missing="$missing pdsh"
command -v sbatch >/dev/null 2>&1 || missing="$missing slurmctld slurmd slurm-client munge"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$missing (install them as root; the tests are skipped without)"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; }; then
    echo "cannot be installed:$missing (the tests are skipped without)"
fi
