# The images that pods use, built here and kept in the cache. Sourced.
#
#   test.local/pause:1   the sandbox
#   test.local/coredns:1 DNS of the cluster
#   test.local/tools:1   Debian's busybox, curl, iptables, iproute2
#   test.local/aws:1     Debian's AWS CLI and boto3
#
# The last two trust the authority of the lab's AWS, and nothing else.

image_dir=$CACHE/images
image_files() { # of the cluster itself, and IMAGES or all others that are there; imdsgate's own is made by deploy/build-image.sh
  local n
  printf '%s ' "$image_dir"/{pause,coredns}.tar
  [ -z "${IMAGES:-}" ] || { printf '%s ' "$IMAGES"; return; }
  for n in tools aws imdsgate; do [ ! -e "$image_dir/$n.tar" ] || printf '%s ' "$image_dir/$n.tar"; done
}

images() (
  mkdir -p "$image_dir"; chmod 700 "$image_dir"
  exec 8>"$image_dir/.lock"; flock 8   # another cluster may be coming up
  mkca aws-ca "imdsgate lab AWS" "$image_dir"
  suite=$(. /etc/os-release; echo "$VERSION_CODENAME")
  image pause "$(sha256sum <"$here/pause/main.go")" pause_rootfs '["/pause"]'
  image coredns "$(cat "$BIN/.coredns.version")" coredns_rootfs '["/coredns"]'
  image tools "$suite" tools_rootfs null
  image aws "$suite" aws_rootfs null
)

image() { # NAME KEY BUILDER ENTRYPOINT: unless it is there, built in this way from this key
  local name=$1 key work t=$SECONDS
  key=$({ declare -f debian "$3"; cat "$here/mkimage.sh" "$image_dir/aws-ca.crt"; echo "$2"; } | sha256sum | cut -c1-16)
  [ -s "$image_dir/$name.tar" ] && [ "$(cat "$image_dir/.$name.key" 2>/dev/null)" = "$key" ] && return
  say "building the image test.local/$name:1"
  work=$(mktemp -d -t imdsgate-image-XXXXXX)
  trap 'rm -rf "'"$work"'"' EXIT
  "$3" "$work/rootfs" >"$work/log" 2>&1 || { tail -5 "$work/log" >&2; rm -rf "$work"; die "cannot build test.local/$name:1"; }
  "$here/mkimage.sh" "$work/rootfs" "test.local/$name:1" "$image_dir/$name.tar.new" "$4"
  mv "$image_dir/$name.tar.new" "$image_dir/$name.tar"
  rm -rf "$work"
  echo "$key" >"$image_dir/.$name.key"
  say "test.local/$name:1 took $((SECONDS - t)) s"
}

pause_rootfs() { mkdir -p "$1" && (cd "$here/.." && CGO_ENABLED=0 GOWORK=off go build -trimpath -ldflags '-s -w' -o "$1/pause" ./cluster/pause); }

coredns_rootfs() { mkdir -p "$1" && cp "$BIN/coredns" "$1"; }

debian() { # DIR PACKAGES: their files; no script of theirs runs
  nice mmdebstrap --variant=extract --mode=root --include="$2" --dpkgopt=path-exclude='/usr/share/doc/*' \
    --dpkgopt=path-exclude='/usr/share/man/*' --dpkgopt=path-exclude='/usr/share/locale/*' "$suite" "$1.tar" || return
  mkdir "$1" && tar -C "$1" --exclude='./dev/*' -xf "$1.tar" && rm "$1.tar"
  local applet
  for applet in $("$1/bin/busybox" --list); do
    [ -e "$1/bin/$applet" ] || [ -e "$1/usr/bin/$applet" ] || [ -e "$1/sbin/$applet" ] || [ -e "$1/usr/sbin/$applet" ] || ln -s busybox "$1/bin/$applet"
  done
  for applet in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    [ ! -e "$1/usr/sbin/xtables-nft-multi" ] || ln -sf xtables-nft-multi "$1/usr/sbin/$applet"
  done
  mkdir -p "$1/etc/ssl/certs" "$1/tmp"
  chmod 1777 "$1/tmp"
  cp "$image_dir/aws-ca.crt" "$1/etc/ssl/certs/ca-certificates.crt"
}
tools_rootfs() { debian "$1" busybox-static,iptables,iproute2,curl,ca-certificates; }
aws_rootfs() { debian "$1" awscli,python3-boto3,libc-bin,busybox-static,curl,ca-certificates; }
daemon() { "$here/../deploy/build-image.sh" >"$image_dir/.imdsgate.log" 2>&1 || { tail -5 "$image_dir/.imdsgate.log" >&2; die "cannot build test.local/imdsgate:dev"; }; }
