package iptables

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// family is all that differs between IPv4 and IPv6.
type family struct {
	name     string // label of metrics and logs
	af       int
	endpoint netip.Addr // of the instance metadata service
	command  string
	legacy   string // the legacy back end's tables in this network namespace, one a line
}

var (
	ipv4 = &family{"ipv4", unix.AF_INET, netip.AddrFrom4([4]byte{169, 254, 169, 254}), "iptables", "/proc/net/ip_tables_names"}
	ipv6 = &family{"ipv6", unix.AF_INET6, netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x0e, 3: 0xc2, 14: 0x02, 15: 0x54}), "ip6tables", "/proc/net/ip6_tables_names"}

	families = []*family{ipv4, ipv6}
)

func familyOf(a netip.Addr) *family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}
