package iptables

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// escaped matches connections to the endpoint that lead elsewhere than to us: opened before the rules, and to be cut, because
// nat looks at the first packet only. What the node itself opened stays, and so does what leads to the previous instance.
type escaped struct {
	endpoint netip.Addr
	ours     []netip.AddrPort
	node     []netip.Addr
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (e escaped) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	addr := func(b []byte) netip.Addr {
		a, _ := netip.AddrFromSlice(b)
		return a.Unmap()
	}
	return addr(flow.Forward.DstIP) == e.endpoint &&
		!slices.Contains(e.node, addr(flow.Forward.SrcIP)) &&
		!slices.Contains(e.ours, netip.AddrPortFrom(addr(flow.Reverse.SrcIP), flow.Reverse.SrcPort))
}

// cutEscaped deletes the conntrack entries of escaped connections: the next packet of each is redirected, and reset.
func cutEscaped(f family, ours ...netip.AddrPort) (uint, error) {
	node, err := nodeAddrs()
	if err != nil {
		return 0, err
	}
	var n uint
	err = whole(func() error {
		deleted, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(f.af()), escaped{f.endpoint(), ours, node})
		n += deleted
		return err
	})
	if err != nil {
		return n, fmt.Errorf("delete %s conntrack entries: %w", f.String(), err)
	}
	return n, nil
}

// inUse says whether a TCP socket of the node has the port and more to do than to wait for its peer's end.
func inUse(f family, port uint16) (used bool, err error) {
	err = whole(func() error {
		sockets, err := netlink.SocketDiagTCP(uint8(f.af()))
		used = slices.ContainsFunc(sockets, func(s *netlink.Socket) bool {
			return s.ID.SourcePort == port && s.State != netlink.TCP_FIN_WAIT2 && s.State != netlink.TCP_TIME_WAIT
		})
		return err
	})
	if err != nil {
		return false, fmt.Errorf("list the node's sockets: %w", err)
	}
	return used, nil
}

// whole repeats a dump that a change has interrupted, a few times.
func whole(dump func() error) (err error) {
	for range 10 {
		if err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

// nodeAddrs returns every address of the node.
func nodeAddrs() ([]netip.Addr, error) {
	var list []netlink.Addr
	err := whole(func() (err error) {
		list, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	addrs := make([]netip.Addr, 0, len(list))
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return addrs, nil
}
