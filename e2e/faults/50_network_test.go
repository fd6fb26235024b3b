package faults

import (
	"testing"
	"time"
)

// Another address on the node's interface: nothing of ours depends on it.
func TestFaultAddressAdded(t *testing.T) {
	f := shared.fault(t, "address added", time.Minute, []int{1})
	before := f.rulesOf(1, "iptables")
	f.strikes(1, "ip addr add 172.30.0.99/24 dev eth0; sleep 3; ip addr del 172.30.0.99/24 dev eth0")
	f.over()
	f.restored(1, "iptables", before)
	f.done(expect{whole: time.Second})
}

// The address that pods are sent to is not the node's for a while. Their requests go to nobody else.
func TestFaultNodeAddressLost(t *testing.T) {
	f := shared.fault(t, "node address lost", 2*time.Minute, []int{1})
	before := f.rulesOf(1, "iptables")
	// With the address go the routes that name it.
	f.strikes(1, `ip route save >/run/routes; ip addr del 172.30.0.11/24 dev eth0; sleep 5
ip addr add 172.30.0.11/24 dev eth0; ip route restore </run/routes 2>/dev/null; ip route replace default via 172.30.0.1; rm /run/routes; ip route | grep -q default`)
	f.over()
	f.restored(1, "iptables", before)
	f.newPods()
	f.done(expect{why: "nobody on the node has the address that pods are sent to", kinds: closed, whole: reconnected})
}

// The pods' bridge is deleted and made anew, as an upgrade of a CNI plugin does.
func TestFaultBridgeRecreated(t *testing.T) {
	f := shared.fault(t, "pod bridge recreated", 2*time.Minute, []int{1})
	before := f.rulesOf(1, "iptables")
	f.strikes(1, `pods=$(ip -o link show master cni0 | awk -F': ' '{print $2}' | cut -d@ -f1); mac=$(ip -o link show cni0 | sed 's/.*ether \([^ ]*\) .*/\1/')
ip link del cni0; ip link add cni0 address $mac type bridge; ip addr add 10.244.1.1/24 dev cni0; ip link set cni0 up
for p in $pods; do ip link set $p master cni0 up; bridge link set dev $p hairpin on; done`)
	f.restored(1, "iptables", before)
	f.newPods()
	f.done(expect{why: "pods have no network", kinds: closed, whole: reconnected})
}
