# A node: the namespaces, and containerd, kubelet and kube-proxy inside. Sourced.

CGROUPS="cpu cpuacct cpuset memory devices freezer blkio pids"

in_node() { # I COMMAND...
  local D=$RUN/node$1; shift
  alive "$D/init" || die "${D##*/} is down"
  nsenter -t "$(pid "$D/init")" -m -n -p -u -C -- "$@"
}

node_network() {
  local i=$1 ns=$P-node$1 j sysctls="net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0"
  ip netns add "$ns"
  ip -n "$ns" link set lo up
  nsenter --net="$(netns "$ns")" -- sysctl -qw $sysctls
  # The same hardware address at every boot: neighbours remember it.
  ip link add eth0 address 02:00:1d:00:01:0"$i" netns "$ns" type veth peer name vnode"$i" netns $CP
  ip -n $CP link set vnode"$i" master br0 up
  ip -n "$ns" addr add 172.30.0.1"$i"/24 dev eth0
  ip -n "$ns" link set eth0 up
  # A hostNetwork process reaches a service IP only if there is a route at all; it ends in the control plane's namespace.
  ip -n "$ns" route add default via 172.30.0.1
  ip -n $CP route replace 10.244."$i".0/24 via 172.30.0.1"$i"
  for j in 1 2 3 4 5 6 7 8 9; do [ "$j" = "$i" ] || ip -n "$ns" route add 10.244."$j".0/24 via 172.30.0.1"$j"; done
  [ -n "${DUAL_STACK:-}" ] || return 0
  ip -n "$ns" addr add fd00:30::1"$i"/64 dev eth0 nodad
  nsenter --net="$(netns "$ns")" -- sysctl -qw net.ipv6.conf.all.forwarding=1
  ip -n "$ns" route add default via fd00:30::1
  ip -n $CP route replace fd00:244:"$i"::/64 via fd00:30::1"$i"
  for j in 1 2 3 4 5 6 7 8 9; do [ "$j" = "$i" ] || ip -n "$ns" route add fd00:244:"$j"::/64 via fd00:30::1"$j"; done
}

# Not on another overlay, as the root of most containers is one.
overlay_works() { # DIR
  local d ok=0
  d=$(mktemp -d "$1/overlay-XXXXXX")
  mkdir "$d"/{lower,upper,work,merged}
  unshare --mount mount -t overlay overlay -o "lowerdir=$d/lower,upperdir=$d/upper,workdir=$d/work" "$d/merged" 2>/dev/null || ok=1
  rm -rf "$d"
  return $ok
}

node_config() {
  local i=$1 N=node$1 D=$RUN/node$1 ip=172.30.0.1$1 ips=172.30.0.1$1 cidrs=10.244.0.0/16 snapshotter=${SNAPSHOTTER:-}
  [ -n "$snapshotter" ] || { overlay_works "$D" && snapshotter=overlayfs; } || snapshotter=native
  local ranges='[{"subnet":"10.244.'$i'.0/24"}]' routes='{"dst":"0.0.0.0/0"}'
  if [ -n "${DUAL_STACK:-}" ]; then
    ranges+=',[{"subnet":"fd00:244:'$i'::/64"}]' routes+=',{"dst":"::/0"}' ips+=,fd00:30::1$i cidrs+=,fd00:244::/32
  fi
  local ipam='"ipMasq":'${MASQUERADE:-false}',"ipam":{"type":"host-local","ranges":['$ranges'],"routes":['$routes']}' main
  case ${CNI:-bridge} in
    bridge) main='{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,'$ipam'}' ;;
    ptp) main='{"type":"ptp",'$ipam'}' ;;
    *) die "CNI is bridge or ptp" ;;
  esac
  echo '{"cniVersion":"0.4.0","name":"pods","plugins":['"$main"',{"type":"portmap","capabilities":{"portMappings":true}}]}' >"$D/10-pods.conflist"
  echo "nameserver 172.30.0.1" >"$D/resolv.conf"
  echo "--node-ip=$ips ${TAINTS:+--register-with-taints=$TAINTS}" >"$D/kubelet.args"
  cat >"$D/containerd.toml" <<K
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs","io.containerd.snapshotter.v1.zfs","io.containerd.snapshotter.v1.aufs","io.containerd.snapshotter.v1.devmapper","io.containerd.tracing.processor.v1.otlp","io.containerd.internal.v1.tracing"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "test.local/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "$snapshotter"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
K
  # failCgroupV1: kubelet would refuse this machine otherwise. oomScoreAdj: it may not lower it without CAP_SYS_RESOURCE.
  cat >"$D/kubelet.yaml" <<K
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
address: $ip
healthzPort: 10248
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/kubelet-server-$N.crt
tlsPrivateKeyFile: $PKI/kubelet-server-$N.key
oomScoreAdj: 0
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]
resolvConf: /etc/resolv.conf
volumePluginDir: /var/lib/kubelet/volumeplugins
evictionHard: {"memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%", "imagefs.inodesFree": "1%"}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 2s
syncFrequency: 10s
shutdownGracePeriod: 0s
K
  cat >"$D/kube-proxy.yaml" <<K
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: ${PROXY_MODE:-iptables}
clientConnection: {kubeconfig: $DATA/kube-proxy.kubeconfig}
clusterCIDR: $cidrs
hostnameOverride: $N
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
K
  cat >"$D/env" <<K
N=$N D=$D BIN=$BIN DATA=$DATA CGROUPS="$CGROUPS" SNAPSHOTTER=$snapshotter IMAGES="$(image_files)"
K
  case ${BOOT:-} in
    "") ;;
    *.service)
      # A line that begins with "-" may fail, as for systemd.
      { echo "#!/bin/sh -e"; sed -n 's/^ExecStart=-\(.*\)/\1 || true/p; s/^ExecStart=\([^-].*\)/\1/p' "$BOOT"; } >"$D/boot"
      chmod 755 "$D/boot" ;;
    *) install -m 755 "$BOOT" "$D/boot" ;;
  esac
}

cgroup_of() { # CONTROLLER NODE: nested under our own, so that whoever accounts for us accounts for it
  local own; own=$(awk -F: -v c="$1" '$2==c{print $3}' /proc/self/cgroup)
  echo "/sys/fs/cgroup/$1${own%/}/$P-$2"
}
remove_cgroup() { # DIR, with the processes that are left in it
  local i p
  for i in $(seq 50); do
    for p in $(find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null); do kill -9 "$p" 2>/dev/null || true; done
    find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [ -d "$1" ] || return 0
    sleep 0.1
  done
  say "$1 does not go away"
}

node_start() {
  local i=$1 N=node$1 D=$RUN/node$1 c g
  ! alive "$D/init" || return 0
  node_stop "$i"
  . "$RUN/options"
  mkdir -p "$D"/{varlib/containerd,varlib/kubelet,varlib/cni,varlog,opt/cni}
  node_network "$i"
  mkcert kubelet-$N /O=system:nodes/CN=system:node:$N clientAuth
  mkcert kubelet-server-$N /O=system:nodes/CN=system:node:$N serverAuth "IP:172.30.0.1$i,DNS:$N"
  mkkubeconfig "$DATA/kubelet-$N.kubeconfig" kubelet-$N
  [ -s "$D/env" ] || node_config "$i"
  rm -f "$D/started"
  date +%s >"$D/booted"
  for c in $CGROUPS; do
    g=$(cgroup_of $c $N)
    mkdir -p "$g"
    if [ $c = cpuset ]; then cat "$g/../cpuset.cpus" >"$g/cpuset.cpus"; cat "$g/../cpuset.mems" >"$g/cpuset.mems"; echo 1 >"$g/cgroup.clone_children"; fi
    echo "$g"
  done >"$D/cgroups"
  (
    while read -r g; do echo $BASHPID >"$g/cgroup.procs"; done <"$D/cgroups"
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
      setsid nsenter --net="$(netns $P-$N)" -- unshare --cgroup --mount --uts --pid --fork --kill-child --mount-proc \
      "$here/node-init.sh" "$D/env"
  ) >>"$D/init.log" 2>&1 </dev/null &
  remember "$D/outer" $!
  until_ok 120 "$N" [ -e "$D/started" -o ! -d /proc/$! ] && [ -e "$D/started" ] || { for g in "$D"/*.log; do tail -n 5 "$g" >&2; done; die "$N did not start"; }
  remember "$D/init" "$(pgrep -P "$(pid "$D/outer")")"
}

# node_stop is a power cut: nothing in the node is told.
node_stop() {
  local i=$1 N=node$1 D=$RUN/node$1 g n
  [ -d "$D" ] || return 0
  if alive "$D/init"; then kill -9 "$(pid "$D/init")"; fi   # pid 1 of its pid namespace: everything in it ends
  if alive "$D/outer"; then
    for n in $(seq 40); do alive "$D/outer" || break; sleep 0.05; done
    ! alive "$D/outer" || kill -9 "$(pid "$D/outer")"
  fi
  rm -f "$D/init.pid" "$D/outer.pid" "$D/started"
  ip netns del $P-$N 2>/dev/null || true
  ip -n $CP link del vnode"$i" 2>/dev/null || true
  if [ -e "$D/cgroups" ]; then while read -r g; do [ ! -d "$g" ] || remove_cgroup "$g"; done <"$D/cgroups"; fi
}

# A node that was down a moment ago is still Ready to the API server: what counts is what this boot reported.
heard_of() { # NODE SINCE
  local status at
  read -r status at < <(kubectl get node "$1" -o 'jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime}{"\n"}{end}' 2>/dev/null) || return 1
  [ "$status" = True ] && [ "$(date -d "$at" +%s)" -ge "$2" ]
}
node_ready() {
  local N=node$1
  until_ok 90 "$N is Ready" heard_of "$N" "$(cat "$RUN/$N/booted")" || { tail -n 5 "$RUN/$N"/kubelet.log >&2; exit 1; }
}

stamp() { echo "/var/lib/containerd/imported-$(basename "$1")-$(stat -c %i-%Y "$1")"; }
load() {
  local i f files=("$@")
  [ $# -gt 0 ] || read -ra files <<<"$(image_files)"
  for i in 1 2 3 4 5 6 7 8 9; do
    alive "$RUN/node$i/init" || continue
    for f in "${files[@]}"; do
      in_node "$i" [ -e "$(stamp "$f")" ] || in_node "$i" sh -c 'ctr -n k8s.io images import --snapshotter "$1" "$2" >/dev/null && touch "$3"' - \
        "$(. "$RUN/node$i/env"; echo "$SNAPSHOTTER")" "$f" "$(stamp "$f")" || die "node$i cannot import $f"
    done
  done
}
