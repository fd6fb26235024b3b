#!/usr/bin/env bash
# qemu.sh arm64|amd64: prints the path of a static QEMU that runs programs of this architecture. Not installed but taken out of its
# package, into ~/.cache/imdsgate-e2e/bin: installed, it would tell the machine's kernel to run every such program.
set -euo pipefail
case ${1:-} in
  arm64) name=qemu-aarch64-static ;;
  amd64) name=qemu-x86_64-static ;;
  *) sed -n '2,3s/^# //p' "$0"; exit 2 ;;
esac
out=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e/bin/$name
if [[ ! -x $out ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cd "$work"
  chmod 755 .
  { apt-get update -qq && apt-get download -qq qemu-user-static; } >&2
  dpkg-deb --fsys-tarfile qemu-user-static_*.deb | tar -x "./usr/bin/$name"
  mkdir -p "${out%/*}"
  cp "usr/bin/$name" "$out.new"
  mv "$out.new" "$out"
fi
echo "$out"
