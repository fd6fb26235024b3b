package control

import (
	"fmt"
	"net/netip"
)

// Addresses of the cloud. They exist only in network namespaces without a way out.
const (
	APIServer = "https://172.30.0.1:6443" // also the issuer of service account tokens
	Region    = "us-east-1"
	Account   = "123456789012"

	// NodeRoleARN is the role of every node; each has sessions of its own.
	NodeRoleARN = "arn:aws:iam::" + Account + ":role/node-role"
)

// Resolver and AWS are where nodes find names and the stand-in for AWS.
var (
	Resolver = netip.MustParseAddr("172.30.0.1")
	AWS      = netip.MustParseAddr("172.30.0.2")
)

// NodeIP is the address of node i, 1 to 9.
func NodeIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{172, 30, 0, byte(10 + i)}) }

// NodeIPv6 is the node's second address when the cluster is dual-stack.
func NodeIPv6(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd00:30::%d", 10+i)) }

var podsIPv4, podsIPv6 = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")

// NodeOf tells whose an address is: the node's own, or that of a pod on it. node is 0 for anybody else's.
func NodeOf(a netip.Addr) (node int, pod bool) {
	for i := 1; i <= 9; i++ {
		if a == NodeIP(i) || a == NodeIPv6(i) {
			return i, false
		}
	}
	switch {
	case podsIPv4.Contains(a):
		return int(a.As4()[2]), true
	case podsIPv6.Contains(a):
		return int(a.As16()[5]), true
	}
	return 0, false
}
