#!/usr/bin/env bash
# Builds the Dockerfile without a registry and without a daemon, and prints the path of the docker-archive:
#
#     e2e/deploy/build-image.sh          # ~/.cache/imdsgate-e2e/images/imdsgate.tar, test.local/imdsgate:dev
#
# Its bases are made here: for the build stage busybox with this machine's Go, module cache and build cache; for the image
# Debian by mmdebstrap, and of that the Dockerfile's own stage with iptables, kept for the next build. Nothing happens while
# nothing has changed. Needs root; installs what is missing.
set -euo pipefail
umask 022

top=$(cd "$(dirname "$0")/../.." && pwd)
images=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e/images
out=$images/imdsgate.tar
tag=test.local/imdsgate:dev
mkdir -p "$images"
exec 9>"$images/lock"
flock 9

# The binary's sources, whether committed or not, and all that makes the image of them.
stamp=$(cd "$top" && {
  go version
  cat e2e/deploy/build-image.sh Dockerfile .dockerignore go.mod go.sum
  find cmd cache proxy iptables -name '*.go' ! -name '*_test.go' -print0 | sort -z | xargs -0 sha256sum
} | sha256sum | cut -d' ' -f1)
if [[ -s $out && $(cat "$out.stamp" 2>/dev/null) == "$stamp" ]]; then
  echo "$out"
  exit
fi

missing=()
for need in buildah:buildah mmdebstrap:mmdebstrap busybox:busybox-static; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if ((${#missing[@]})); then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2
fi

work=$(mktemp -d)
storage=(--storage-driver vfs --root "$work/storage" --runroot "$work/run")
trap 'rm -rf "$work"' EXIT

mkdir "$work/go"
cp "$(command -v busybox)" "$work/go/busybox"
cat >"$work/go.dockerfile" <<'F'
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "mkdir", "/tmp"]
RUN ["/bin/busybox", "--install", "/bin"]
ENV PATH=/usr/local/go/bin:/bin GOPATH=/go GOCACHE=/go/cache GOTOOLCHAIN=local
F

bud() { buildah "${storage[@]}" bud --isolation chroot --pull-never --layers=false --quiet "$@" >&2; }

# Kept for as long as the Dockerfile is the same.
suite=$(. /etc/os-release; echo "$VERSION_CODENAME")
base=$images/base-$suite-$(sha256sum <"$top/Dockerfile" | cut -c1-16).tar
if [[ -s $base ]]; then
  buildah "${storage[@]}" pull --quiet "docker-archive:$base" >&2
else
  mkdir "$work/debian"
  mmdebstrap --quiet --variant=apt --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$work/debian/base.tar" >&2
  printf 'FROM scratch\nADD base.tar /\n' >"$work/debian/Dockerfile"
  bud -t localhost/plain "$work/debian"
  bud -t localhost/debian --target debian --build-arg BASE=localhost/plain --build-arg "TARGETARCH=$(go env GOARCH)" -f "$top/Dockerfile" "$work/debian"
  rm -f "$images"/base-*.tar
  buildah "${storage[@]}" push --quiet localhost/debian "docker-archive:$base.new:localhost/debian:latest" >&2
  mv "$base.new" "$base"
fi

bud -t localhost/go -f "$work/go.dockerfile" "$work/go"
mkdir -p "$(go env GOMODCACHE)" "$(go env GOCACHE)"
bud -t "$tag" --build-arg GO=localhost/go --build-arg BASE=localhost/debian --build-arg "TARGETARCH=$(go env GOARCH)" \
  -v "$(go env GOROOT):/usr/local/go:ro" -v "$(go env GOMODCACHE):/go/pkg/mod" -v "$(go env GOCACHE):/go/cache" \
  --env "GOPROXY=$(go env GOPROXY)" --unsetenv GOPROXY -f "$top/Dockerfile" "$top"
rm -f "$out.new"
buildah "${storage[@]}" push --quiet "$tag" "docker-archive:$out.new:$tag" >&2
mv "$out.new" "$out"
echo "$stamp" >"$out.stamp"
echo "$out"
