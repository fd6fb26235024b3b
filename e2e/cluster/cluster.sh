#!/usr/bin/env bash
# cluster.sh: a real Kubernetes of several nodes on one machine, in network namespaces without a way out.
#
#   up [N]                  control plane, fabric and nodes; waits until all are Ready. What is up stays up.
#                           N, or NODES of the environment, is 2 at first
#   down                    removes everything, also what a dead run left
#   node-up I, node-down I  a boot, and a power cut. I is 1 to 9
#   cp-kill NAME, cp-start  the end of one of the control plane's programs, etcd or kube-apiserver; the start of those that ended
#   k ARGS...               kubectl
#   in cp|nodeI CMD...      any command in the control plane's network or in a node
#   daemon                  builds the image of imdsgate from this checkout, test.local/imdsgate:dev, and loads it
#   load [FILE...]          imports images (docker-archives) into every node that is up; without files those that changed
#   status                  what is up; exit 1 when nothing is
#   deps, images            only installs what is missing, only builds the images
#
# Options, by environment; a node keeps those of its first boot:
#   CNI=bridge|ptp  PROXY_MODE=iptables|nftables  SNAPSHOTTER=native (else overlayfs, where that works)  DUAL_STACK=1  MASQUERADE=true
#   TAINTS=key=value:NoSchedule,...  what the kubelet registers a new Node with
#   BOOT=FILE                        a script that runs in the node at every boot, before anything of Kubernetes; of a
#                                    systemd unit (*.service) its ExecStart lines
#   IMAGES="FILE..."                 images in place of tools, aws and imdsgate of the cache
#   CLUSTER=imdsgate-cluster         name, which makes it another cluster beside one that is up
#
# Layout: the control plane in the network namespace imdsgate-cluster-cp, 172.30.0.1; the fabric beside it: AWS (172.30.0.2),
# the real metadata endpoint, the nodes' resolver. Node I is a network, mount, pid, uts and cgroup namespace, 172.30.0.(10+I),
# pods 10.244.I.0/24, and only addresses of pods reach the fabric as they are (MASQUERADE=true makes them the node's).
# State is in /var/tmp/imdsgate-cluster: /run and /var/lib are the nodes' own inside of them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e
BIN=$CACHE/bin
P=${CLUSTER:-imdsgate-cluster}
RUN=/var/tmp/$P
CP=$P-cp
DATA=$RUN/cp
PKI=$DATA/pki
API=https://172.30.0.1:6443
. "$here/lib.sh"
. "$here/controlplane.sh"
. "$here/node.sh"
. "$here/images.sh"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

up() {
  local t=$SECONDS i n=${1:-${NODES:-2}}
  case $n in [1-9]) ;; *) die "NODES is 1 to 9" ;; esac
  [ -d /sys/fs/cgroup/memory ] || die "this machine has only cgroup v2, with which the nodes were never tried: boot with systemd.unified_cgroup_hierarchy=0"
  deps
  binaries
  images
  cp_up
  local starts=()
  for i in $(seq "$n"); do node_start "$i" & starts+=($!); done
  for i in "${starts[@]}"; do wait "$i" || die "not every node came up"; done
  for i in $(seq "$n"); do node_ready "$i"; done
  load
  # Nodes that register with a taint may not run it yet.
  [ -z "$(grep -L register-with-taints "$RUN"/node*/kubelet.args)" ] ||
    kubectl -n kube-system rollout status deployment/coredns --timeout=60s >/dev/null || die "CoreDNS does not start"
  echo "cluster: $n nodes Ready after $((SECONDS - t)) s"
  echo "cluster: KUBECONFIG=$RUN/kubeconfig   (or: $here/cluster.sh k get pods -A)"
}

down() {
  local i t=$SECONDS
  local stops=()
  for i in 1 2 3 4 5 6 7 8 9; do [ ! -d "$RUN/node$i" ] || { node_stop "$i" & stops+=($!); }; done
  [ ${#stops[@]} = 0 ] || wait "${stops[@]}"
  cp_down
  leftovers
  rm -rf "$RUN" 2>/dev/null || [ -z "$(ls -A "$RUN")" ] || die "$RUN does not go away" # it may be a mount point
  echo "cluster: gone after $((SECONDS - t)) s"
}

main() {
  case ${1:-} in
    up) up "${2:-}" ;;
    down) down ;;
    node-up) index "$2"; alive "$DATA/kube-apiserver" || die "there is no cluster: $0 up"; node_start "$2"; node_ready "$2" ;;
    node-down) index "$2"; node_stop "$2" ;;
    cp-kill)
      case ${2:-} in etcd | kube-apiserver | kube-controller-manager | kube-scheduler) ;; *) die "that is none of the control plane's programs" ;; esac
      alive "$DATA/$2" || die "$2 does not run"
      stop "$DATA/$2" ;;
    cp-start) [ -e "$RUN/options" ] || die "there is no cluster: $0 up"; cp_up ;;
    load) shift; load "$@" ;;
    daemon) daemon; load ;;
    deps) deps ;;
    images) deps; binaries kubectl coredns; images ;;
    *) usage; exit 2 ;;
  esac
}

[ "$(id -u)" = 0 ] || die "namespaces, mounts and cgroups need root"
case ${1:-} in
  k) shift; kubectl "$@" ;;
  in)
    who=$2; shift 2
    case $who in
      cp) in_cp "$@" ;;
      node[1-9]) in_node "${who#node}" "$@" ;;
      *) die "in cp or in node1 to node9" ;;
    esac ;;
  status) status ;;
  *)
    # One at a time; the lock is not handed on to what runs longer than this.
    if [ -z "${CLUSTER_LOCKED:-}" ]; then
      mkdir -p /var/tmp
      CLUSTER_LOCKED=1 exec flock --close --timeout 900 /var/lock/$P.lock "$here/cluster.sh" "$@"
    fi
    main "$@" ;;
esac
