package hostile

import (
	"net"
	"net/http"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A pod on a link of its own says by ARP and neighbour discovery that every address is at its own, that it is a router, and
// where others should send. It changes nobody's way: not the node's to the endpoint, not another pod's to the node.
func TestHostileNeighbours(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{})
	before := s.on(t, "ip route; ip -6 route show | grep -v ^fe80")
	mac := hardwareAddress(t, s.mallory)
	me := linkLocal(t, s.mallory)
	all := netip.MustParseAddr("ff02::1")
	claimed4 := append(s.victim.IPs[:1:1], imds.IPv4, s.IP, netip.MustParseAddr("172.30.0.1"))
	claimed6 := append(s.victim.IPs[1:2:2], imds.IPv6, s.IPv6, netip.MustParseAddr("fd00:30::1"))
	for range 3 {
		for _, ip := range claimed4 {
			announce(t, s.mallory, ip, mac)
		}
		for _, ip := range claimed6 {
			advertisement := append([]byte{136, 0, 0, 0, 0x20 | 0x80, 0, 0, 0}, ip.AsSlice()...) // override, router
			advertisement = append(append(advertisement, 2, 1), mac...)
			multicast(t, s.mallory, discovery(me, all, advertisement))
			multicast(t, s.mallory, discovery(ip, all, advertisement))
			redirect := append([]byte{137, 0, 0, 0, 0, 0, 0, 0}, me.AsSlice()...)
			redirect = append(redirect, ip.AsSlice()...)
			for _, from := range []netip.Addr{me, netip.MustParseAddr("fd00:30::1")} {
				multicast(t, s.mallory, discovery(from, s.IPv6, redirect))
			}
		}
		router := []byte{134, 0, 0, 0, 255, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}
		router = append(router, mac...)
		prefix := append([]byte{3, 4, 64, 0xc0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, netip.MustParseAddr("fd00:ec2::").AsSlice()...)
		route := append([]byte{24, 3, 128, 8, 0, 0, 0xff, 0xff}, imds.IPv6.AsSlice()...)
		multicast(t, s.mallory, discovery(me, all, append(append(router, prefix...), route...)))
	}
	if after := s.on(t, "ip route; ip -6 route show | grep -v ^fe80"); after != before {
		t.Errorf("the node's routes were\n%s, now\n%s", before, after)
	}
	if _, err := ask(ctx, s.victim, http.MethodGet, "/latest/meta-data/placement/region", nil); err != nil {
		t.Errorf("the daemon does not reach the real endpoint: %v", err)
	}
	for range 3 {
		if err := s.own(ctx, s.victim); err != nil {
			t.Error(err)
		}
		mustDial(t, s.victim, endpoint6)
	}
	s.untouched(t)
}

func linkLocal(t testing.TB, p *lab.Pod) (ip netip.Addr) {
	t.Helper()
	err := p.Net.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := eth0.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
				ip = p.Addr()
			}
		}
		return err
	})
	if err != nil || !ip.IsValid() {
		t.Fatalf("no link-local address: %v", err)
	}
	return ip
}

// discovery is a packet of neighbour discovery, which must not have passed a router.
func discovery(src, dst netip.Addr, message []byte) []byte {
	pseudo := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	pseudo = append(pseudo, 0, 0, byte(len(message)>>8), byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6)
	message[2], message[3] = 0, 0
	sum := checksum(append(pseudo, message...))
	message[2], message[3] = byte(sum>>8), byte(sum)
	packet := header6(src, dst, unix.IPPROTO_ICMPV6, message)
	packet[7] = 255
	return packet
}

// multicast puts an IPv6 packet on the pod's link for everybody.
func multicast(t testing.TB, p *lab.Pod, packet []byte) {
	t.Helper()
	err := p.Net.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrLinklayer{Protocol: 0xdd86, Ifindex: eth0.Index, Halen: 6, Addr: [8]byte{0x33, 0x33, 0, 0, 0, 1}})
	})
	if err != nil {
		t.Fatal(err)
	}
}
