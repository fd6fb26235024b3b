#!/usr/bin/env bash
# mkimage.sh DIR NAME:TAG OUT.tar [ENTRYPOINT_JSON]: a docker-archive image of one layer
set -euo pipefail
dir=$1 name=$2 out=$3 entrypoint=${4:-null}
work=$(mktemp -d); trap 'rm -rf $work' EXIT
arch=$(dpkg --print-architecture)
tar -C "$dir" --numeric-owner --sort=name --mtime=@0 -cf "$work/layer.tar" .
digest=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
jq -nc --arg d "sha256:$digest" --arg a "$arch" --argjson e "$entrypoint" '{architecture:$a,os:"linux",created:"1970-01-01T00:00:00Z",
  config:{Entrypoint:$e,Env:["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","AWS_DEFAULT_REGION=us-east-1","AWS_PAGER="]},
  rootfs:{type:"layers",diff_ids:[$d]},history:[{created:"1970-01-01T00:00:00Z"}]}' >"$work/config.json"
jq -nc --arg n "$name" '[{Config:"config.json",RepoTags:[$n],Layers:["layer.tar"]}]' >"$work/manifest.json"
tar -C "$work" -cf "$out" manifest.json config.json layer.tar
