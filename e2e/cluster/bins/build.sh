#!/usr/bin/env bash
# build.sh [NAME...]: builds the lab's Kubernetes binaries from the Go module proxy into
# ${XDG_CACHE_HOME:-~/.cache}/imdsgate-e2e/bin and skips those that are there in the pinned version.
# Without names: all of them. About 12 minutes once on two cores; nothing to do takes a second.
set -euo pipefail
cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e
out=$cache/bin
helm=v4.3.1
coredns=v1.15.0
kube=$(awk '$1=="k8s.io/kubernetes" && $2 ~ /^v/ {print $2}' go.mod)
etcd=$(awk '$1=="go.etcd.io/etcd/server/v3" && $2 ~ /^v/ {print $2}' go.mod)
[ $# -gt 0 ] || set -- etcd kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy helm coredns
export CGO_ENABLED=0 GOTOOLCHAIN=local GOWORK=off GOFLAGS="-buildvcs=false -trimpath"
mkdir -p "$out"
# One builder at a time: two would compile the same packages twice.
exec 9>"$cache/build.lock"
flock -n 9 || { echo "cluster-bins: another build is running, waiting for it"; flock 9; }

minor=${kube#v1.}; minor=${minor%.*}
v=k8s.io/component-base/version
ld="-s -w -X $v.gitVersion=$kube -X $v.gitMajor=1 -X $v.gitMinor=$minor -X $v.gitTreeState=clean -X $v.gitCommit=goproxy -X $v.buildDate=1970-01-01T00:00:00Z"
for name; do
  case $name in
    etcd) want=$etcd ;;
    helm) want=$helm ;;
    coredns) want=$coredns-$(sha256sum <coredns/main.go | cut -c1-8) ;;
    *) want=$kube ;;
  esac
  if [ -x "$out/$name" ] && [ "$(cat "$out/.$name.version" 2>/dev/null)" = "$want" ]; then
    continue
  fi
  echo "cluster-bins: building $name $want"
  t=$SECONDS
  case $name in
    etcd) nice -n 10 go build -ldflags "-s -w" -o "$out/etcd.new" go.etcd.io/etcd/server/v3 && mv "$out/etcd.new" "$out/etcd" ;;
    helm) (cd / && GOBIN=$out nice -n 10 go install -ldflags "-s -w" "helm.sh/helm/v4/cmd/helm@$helm") ;;
    coredns)
      mod=$(mktemp -d); trap 'rm -rf "$mod"' EXIT
      cp coredns/main.go "$mod"
      (cd "$mod" && go mod init coredns && go get "github.com/coredns/coredns@$coredns") 2>"$mod/log" || { tail -5 "$mod/log" >&2; exit 1; }
      (cd "$mod" && nice -n 10 go build -ldflags "-s -w" -o "$out/coredns.new" main.go) && mv "$out/coredns.new" "$out/coredns" ;;
    *) nice -n 10 go build -ldflags "$ld" -o "$out/$name.new" "k8s.io/kubernetes/cmd/$name" && mv "$out/$name.new" "$out/$name" ;;
  esac
  echo "$want" >"$out/.$name.version"
  echo "cluster-bins: $name built in $((SECONDS - t)) s"
done
echo "cluster-bins: ${*} in $out"
