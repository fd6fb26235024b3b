package imds

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Packets counts packets of one kind that arrived for the endpoint.
type Packets struct {
	Source, Destination netip.Addr
	Protocol            string // tcp, udp, icmp, or the protocol's number
	Port                uint16 // of the endpoint; 0 without ports
	Count               int
}

func (p Packets) String() string {
	return fmt.Sprintf("%d %s packets from %s to %s port %d", p.Count, p.Protocol, p.Source, p.Destination, p.Port)
}

// capture counts packets by a packet socket: it sees them before netfilter and routing do.
type capture struct {
	file      *os.File
	iface     int            // index of the one whose packets count
	marker    net.PacketConn // not connected: it would be told of refusals instead of sending
	mu        sync.Mutex
	counts    map[Packets]int // with Count 0
	marked    uint64
	markerSeq uint64
	changed   chan struct{}
}

// markerPort is where settle sends packets of its own, over the loopback device.
const markerPort = 9

// Capture begins to count the packets that arrive on an interface for the endpoint, until Close. It is called on a thread
// inside the network namespace that holds the endpoint.
func (s *Server) Capture(interfaceName string) error {
	ifi, err := net.InterfaceByName(interfaceName)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	c := &capture{file: os.NewFile(uintptr(fd), "capture"), iface: ifi.Index, counts: map[Packets]int{}, changed: make(chan struct{})}
	filter := endpointFilter()
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		// Of every interface: the markers come over the loopback device.
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}),
	)
	if err == nil {
		c.marker, err = net.ListenPacket("udp", netip.AddrPortFrom(IPv4, 0).String())
	}
	if err != nil {
		c.file.Close()
		return fmt.Errorf("capture packets to the endpoint: %w", err)
	}
	s.capture = c
	go c.run()
	return nil
}

// Close ends the capture.
func (s *Server) Close() error {
	if s.capture == nil {
		return nil
	}
	return errors.Join(s.capture.marker.Close(), s.capture.file.Close())
}

// endpointFilter passes packets whose destination is the endpoint, whatever else is in them. It sees packets from their IP
// header on.
func endpointFilter() []unix.SockFilter {
	const (
		ldh  = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		ld   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
		kind = 0xfffff000 // SKF_AD_OFF + SKF_AD_PROTOCOL
	)
	v4, v6 := IPv4.As4(), IPv6.As16()
	word := func(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
	const pass, drop = 11, 12
	return []unix.SockFilter{
		0:    {Code: ldh, K: kind},
		1:    {Code: jeq, K: unix.ETH_P_IP, Jf: 2},
		2:    {Code: ld, K: 16},
		3:    {Code: jeq, K: word(v4[:]), Jt: pass - 4, Jf: drop - 4},
		4:    {Code: jeq, K: unix.ETH_P_IPV6, Jf: drop - 5},
		5:    {Code: ld, K: 24 + 0},
		6:    {Code: jeq, K: word(v6[0:]), Jf: drop - 7},
		7:    {Code: ld, K: 24 + 4},
		8:    {Code: jeq, K: word(v6[4:]), Jf: drop - 9},
		9:    {Code: ld, K: 24 + 12},
		10:   {Code: jeq, K: word(v6[12:]), Jf: drop - 11},
		pass: {Code: ret, K: 256},
		drop: {Code: ret, K: 0},
	}
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *capture) run() {
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 256)
	for {
		var n int
		var from unix.Sockaddr
		var readErr error
		if err := raw.Read(func(fd uintptr) bool {
			n, from, readErr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(readErr, unix.EAGAIN)
		}); err != nil {
			return // closed
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && readErr == nil && ll.Pkttype != unix.PACKET_OUTGOING {
			c.add(ll.Ifindex, buf[:n])
		}
	}
}

func (c *capture) add(ifindex int, b []byte) {
	p, payload, ok := parse(b)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case p.Source == IPv4 && p.Port == markerPort && len(payload) >= 8:
		c.marked = max(c.marked, binary.BigEndian.Uint64(payload))
		close(c.changed)
		c.changed = make(chan struct{})
	case ifindex == c.iface:
		c.counts[p]++
	}
}

// parse reads the start of an IP packet. payload is a UDP datagram's.
func parse(b []byte) (p Packets, payload []byte, ok bool) {
	var protocol byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.Source, p.Destination = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		protocol, b = b[9], b[min(len(b), int(b[0]&15)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		p.Source, p.Destination = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		protocol, b = b[6], b[40:]
	default:
		return p, nil, false
	}
	switch protocol {
	case unix.IPPROTO_TCP:
		p.Protocol = "tcp"
	case unix.IPPROTO_UDP:
		p.Protocol = "udp"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		p.Protocol = "icmp"
		return p, nil, true
	default:
		p.Protocol = fmt.Sprint(protocol)
		return p, nil, true
	}
	if len(b) >= 4 {
		p.Port = binary.BigEndian.Uint16(b[2:])
	}
	if len(b) >= 8 {
		payload = b[8:]
	}
	return p, payload, true
}

// Packets are those that have arrived up to now from the sources, all when there are none.
func (s *Server) Packets(ctx context.Context, sources ...netip.Addr) ([]Packets, error) {
	c := s.capture
	if c == nil {
		return nil, errors.New("no packets are captured")
	}
	if err := c.settle(ctx); err != nil {
		return nil, fmt.Errorf("wait for the capture: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var ps []Packets
	for p, n := range c.counts {
		if len(sources) == 0 || slices.Contains(sources, p.Source) {
			p.Count = n
			ps = append(ps, p)
		}
	}
	slices.SortFunc(ps, func(a, b Packets) int { return a.Source.Compare(b.Source) })
	return ps, nil
}

// settle returns when every packet that arrived before the call has been counted: a packet of our own has come through the
// same queue.
func (c *capture) settle(ctx context.Context) error {
	c.mu.Lock()
	c.markerSeq++
	seq := c.markerSeq
	c.mu.Unlock()
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(IPv4, markerPort))
	if _, err := c.marker.WriteTo(binary.BigEndian.AppendUint64(nil, seq), to); err != nil {
		return err
	}
	for {
		c.mu.Lock()
		done, changed := c.marked >= seq, c.changed
		c.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
