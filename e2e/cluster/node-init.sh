#!/usr/bin/env bash
# node-init.sh ENV: pid 1 of a node. What cannot be made private ends it: the next line would change the machine's own.
set -eu
. "$1"
hostname "$N"
mount --make-rprivate /
# this node's own root of every cgroup v1 hierarchy
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for c in $CGROUPS; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c; done
# hold no one else's namespaces
awk '$2 ~ "^/run/netns/" {print $2}' /proc/self/mounts | while read -r m; do umount -l "$m"; done
# private /run, /etc (copy on write), /var/lib, /var/log, /opt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock
mkdir /run/etc /run/etc.work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc.work /etc
mount --bind "$D/varlib" /var/lib
mount --bind "$D/varlog" /var/log
mount --bind "$D/opt" /opt
[ -e /opt/cni/bin ] || ln -s /usr/lib/cni /opt/cni/bin
rm -f /etc/resolv.conf
cp "$D/resolv.conf" /etc/resolv.conf
rm -rf /etc/cni/net.d
mkdir -p /etc/cni/net.d
cp "$D/10-pods.conflist" /etc/cni/net.d/
# kernel settings that kubelet would write for the whole machine: show it what it wants
mkdir -p /run/sysctl
show() { [ -e "/proc/sys/$1" ] || return 0; local f=/run/sysctl/${1//\//_}; echo "$2" >"$f"; mount --bind "$f" "/proc/sys/$1"; }
show vm/overcommit_memory 1
show vm/panic_on_oom 0
show kernel/panic 10
show kernel/panic_on_oops 1
show kernel/keys/root_maxkeys 1000000
show kernel/keys/root_maxbytes 25000000
mount --make-rshared /
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables
echo 1 >/proc/sys/net/bridge/bridge-nf-call-ip6tables || true # a kernel without IPv6
if [ -x "$D/boot" ]; then "$D/boot" >>"$D/boot.log" 2>&1 || { echo "the boot script failed: $?" >>"$D/boot.log"; exit 1; }; fi
containerd --config "$D/containerd.toml" >>"$D/containerd.log" 2>&1 &
until ctr version >/dev/null 2>&1; do kill -0 $! || exit 1; sleep 0.05; done
for t in $IMAGES; do
  stamp=/var/lib/containerd/imported-$(basename "$t")-$(stat -c %i-%Y "$t")
  [ -e "$stamp" ] || { ctr -n k8s.io images import --snapshotter "$SNAPSHOTTER" "$t" && touch "$stamp"; }
done >>"$D/images.log" 2>&1
"$BIN/kubelet" --config="$D/kubelet.yaml" --kubeconfig="$DATA/kubelet-$N.kubeconfig" --hostname-override="$N" \
  $(cat "$D/kubelet.args") --v=2 >>"$D/kubelet.log" 2>&1 &
"$BIN/kube-proxy" --config="$D/kube-proxy.yaml" >>"$D/kube-proxy.log" 2>&1 &
touch "$D/started"
while :; do sleep 3600 & wait $!; done
