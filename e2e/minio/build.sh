#!/usr/bin/env bash
# build.sh: builds the MinIO server that TestMinIO runs from the Go module proxy into
# ${XDG_CACHE_HOME:-~/.cache}/imdsgate-e2e/bin, and skips it when the pinned version is there.
# About 10 minutes once on two cores.
set -euo pipefail
cd "$(dirname "$0")/server"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e
out=$cache/bin
want=$(awk '$1=="github.com/minio/minio" {print $2}' go.mod)
export CGO_ENABLED=0 GOTOOLCHAIN=local GOWORK=off GOFLAGS="-buildvcs=false -trimpath"
mkdir -p "$out"
# A lock of its own: the cluster's build need not wait for this one.
exec 9>"$cache/minio.lock"
flock -n 9 || { echo "minio: another build is running, waiting for it"; flock 9; }

[ -x "$out/minio" ] && [ "$(cat "$out/.minio.version" 2>/dev/null)" = "$want" ] && exit 0
echo "minio: building $want"
nice -n 19 go build -ldflags "-s -w" -o "$out/minio.new" github.com/minio/minio
mv "$out/minio.new" "$out/minio"
echo "$want" >"$out/.minio.version"
echo "minio: built in $SECONDS s"
