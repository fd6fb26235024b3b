#!/usr/bin/env bash
# Prometheus and promtool of Debian's package, unpacked into the cache: installed, the package would start a server of its own.
set -euo pipefail
dir=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e/prometheus
[ ! -x "$dir/usr/bin/promtool" ] || exit 0
echo "monitoring: unpacking Debian's prometheus into $dir"
mkdir -p "$dir"
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
[ -n "$(apt-cache policy prometheus 2>/dev/null)" ] || apt-get update -qq
apt-get download -qq prometheus
dpkg-deb -x prometheus_*.deb "$dir"
