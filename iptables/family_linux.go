package iptables

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// family is an address family, and all that differs between the two.
type family int

const (
	ipv4 family = iota
	ipv6
)

func families() []family { return []family{ipv4, ipv6} }

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

// pick returns the family's one of two values.
func pick[T any](f family, four, six T) T {
	if f == ipv4 {
		return four
	}
	return six
}

// String is the label of metrics and logs.
func (f family) String() string { return pick(f, "ipv4", "ipv6") }

func (f family) af() uint8 { return pick[uint8](f, unix.AF_INET, unix.AF_INET6) }

// endpoint is the address of the instance metadata service.
func (f family) endpoint() netip.Addr {
	return pick(f, netip.AddrFrom4([4]byte{169, 254, 169, 254}), netip.AddrFrom16([16]byte{0: 0xfd, 2: 0x0e, 3: 0xc2, 14: 0x02, 15: 0x54}))
}

func (f family) command() string { return pick(f, "iptables", "ip6tables") }

// legacyTables is the file that names the legacy back end's tables in this network namespace.
func (f family) legacyTables() string {
	return pick(f, "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
}
