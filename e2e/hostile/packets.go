package hostile

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/imds"
)

// Place is where packets are sent from, and to whom beside the endpoint.
type Place struct {
	Pod, Pod6   netip.Addr // sources
	Node, Node6 netip.Addr // the pod's
	Gateway     netip.Addr // the pod's
	Neighbour   netip.Addr // another pod of the node
}

// Packets are those that no socket makes, from their IP header on: every protocol, every port, fragments, source routes, tunnels,
// extension headers, ICMP redirects.
func Packets(p Place) (packets [][]byte) {
	me, me6 := p.Pod, p.Pod6
	to, to6 := netip.AddrPortFrom(imds.IPv4, 80), netip.AddrPortFrom(imds.IPv6, 80)
	add := func(b ...[]byte) { packets = append(packets, b...) }
	syn := func(port uint16, dst netip.AddrPort) []byte {
		src := netip.AddrPortFrom(me, port)
		if dst.Addr().Is6() {
			src = netip.AddrPortFrom(me6, port)
		}
		return segment(src, dst, synFlag, 1, 0)
	}
	for protocol := range 256 { // 0 is hop-by-hop options, 4 IP in IP, 41 IPv6, 47 GRE, 50 ESP, 132 SCTP
		inner := header(me, imds.IPv4, unix.IPPROTO_TCP, 1, 0, nil, syn(4000, to))
		add(header(me, imds.IPv4, byte(protocol), uint16(protocol), 0, nil, syn(4001, netip.AddrPortFrom(imds.IPv4, 81))))
		add(header(me, p.Node, byte(protocol), uint16(protocol), 0, nil, inner)) // a tunnel that ends at the node
		add(header6(me6, imds.IPv6, byte(protocol), syn(4002, netip.AddrPortFrom(imds.IPv6, 81))))
	}
	for port := 1; port < 65536; port += 7 {
		if port != 80 {
			add(header(me, imds.IPv4, unix.IPPROTO_TCP, 7, 0, nil, syn(4003, netip.AddrPortFrom(imds.IPv4, uint16(port)))))
		}
	}
	for flags := range 256 { // no connection begins with these
		add(header(me, imds.IPv4, unix.IPPROTO_TCP, 8, 0, nil, segment(netip.AddrPortFrom(me, uint16(5000+flags)), to, byte(flags), 1, 1, []byte("GET /latest/user-data HTTP/1.0\r\n\r\n")...)))
		add(header6(me6, imds.IPv6, unix.IPPROTO_TCP, segment(netip.AddrPortFrom(me6, uint16(5000+flags)), to6, byte(flags), 1, 1, []byte("GET /latest/user-data HTTP/1.0\r\n\r\n")...)))
	}
	// Fragments: the ports in the first, flags in the second; in any order, overlapping, tiny, and without a first.
	whole := append(syn(4010, to), make([]byte, 20)...)
	const more = 0x2000
	for id, parts := range [][][3]int{
		{{0, 8, more}, {8, 40, 0}}, {{8, 40, 0}, {0, 8, more}}, {{0, 16, more}, {8, 40, 0}}, {{0, 16, more}, {16, 40, 0}}, {{8, 16, more}}, {{0, 8, more}, {8, 16, more}, {16, 24, more}, {24, 40, 0}}, {{0, 40, more}}, {{16, 40, 0}},
	} {
		for _, p := range parts {
			add(header(me, imds.IPv4, unix.IPPROTO_TCP, uint16(100+id), uint16(p[2]|p[0]/8), nil, whole[p[0]:p[1]]))
		}
	}
	for _, options := range [][]byte{
		{131, 7, 4, 169, 254, 169, 254, 0}, {137, 7, 4, 169, 254, 169, 254, 0}, {7, 7, 4, 0, 0, 0, 0, 0}, {148, 4, 0, 0}, {68, 8, 5, 0, 0, 0, 0, 0},
	} { // source routes, record route, router alert, timestamps
		add(header(me, imds.IPv4, unix.IPPROTO_TCP, 200, 0, options, syn(4020, netip.AddrPortFrom(imds.IPv4, 82))))
		add(header(me, p.Node, unix.IPPROTO_TCP, 201, 0, options, syn(4021, netip.AddrPortFrom(p.Node, 80))))
	}
	segmentRouting := append([]byte{unix.IPPROTO_TCP, 2, 0, 1, 0, 0, 0, 0}, imds.IPv6.AsSlice()...) // type 0
	add(header6(me6, p.Node6, unix.IPPROTO_ROUTING, append(segmentRouting, syn(4030, to6)...)))
	segmentRouting[2] = 4 // and 4
	add(header6(me6, p.Node6, unix.IPPROTO_ROUTING, append(slices.Clone(segmentRouting), syn(4031, to6)...)))
	for _, next := range []byte{unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS} {
		add(header6(me6, imds.IPv6, next, append([]byte{unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}, syn(4032, netip.AddrPortFrom(imds.IPv6, 83))...)))
	}
	add(header6(me6, imds.IPv6, unix.IPPROTO_FRAGMENT, append([]byte{unix.IPPROTO_TCP, 0, 0, 1, 0, 0, 0, 9}, whole[:8]...)),
		header6(me6, imds.IPv6, unix.IPPROTO_FRAGMENT, append([]byte{unix.IPPROTO_TCP, 0, 0, 8, 0, 0, 0, 9}, whole[8:]...)))
	// To the node and to the other pod: the endpoint is over here.
	for _, victim := range []netip.Addr{p.Node, p.Neighbour} {
		quoted := header(victim, imds.IPv4, unix.IPPROTO_TCP, 1, 0, nil, make([]byte, 8))
		redirect := append([]byte{5, 1, 0, 0}, me.AsSlice()...)
		redirect = append(redirect, quoted...)
		sum := checksum(redirect)
		redirect[2], redirect[3] = byte(sum>>8), byte(sum)
		for _, from := range []netip.Addr{p.Gateway, netip.MustParseAddr("172.30.0.1"), me, imds.IPv4} {
			add(header(from, victim, unix.IPPROTO_ICMP, 300, 0, nil, redirect))
		}
	}
	return packets
}

// segment is a TCP segment of the length of its header, with data behind it.
func segment(src, dst netip.AddrPort, flags byte, seq, ack uint32, data ...byte) []byte {
	b := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 64000)
	b = append(b, data...)
	s, d := src.Addr().AsSlice(), dst.Addr().AsSlice()
	pseudo := append(append(append([]byte{}, s...), d...), 0, unix.IPPROTO_TCP)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(b)))
	binary.BigEndian.PutUint16(b[16:], checksum(append(pseudo, b...)))
	return b
}

const synFlag = 2

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i]) << 8
		if i+1 < len(b) {
			w |= uint32(b[i+1])
		}
		sum += w
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// header is an IPv4 header for a payload; fragment holds the flags and the offset in units of eight bytes.
func header(src, dst netip.Addr, protocol byte, id, fragment uint16, options []byte, payload []byte) []byte {
	b := make([]byte, 20+len(options))
	b[0] = 4<<4 | byte(len(b)/4)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(payload)))
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[8], b[9] = 64, protocol
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	copy(b[20:], options)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, payload...)
}

// header6 is an IPv6 header.
func header6(src, dst netip.Addr, next byte, payload []byte) []byte {
	b := make([]byte, 40)
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = next, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}
