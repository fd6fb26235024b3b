package hostile

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link sends packets over a pod's only link to the node as they are: neither the pod's routing nor its netfilter, nor its addresses
// have a say. It needs CAP_NET_RAW, which containers have by default.
type Link struct {
	file    int
	gateway unix.SockaddrLinklayer
}

// OpenLink opens that of the network namespace where it is called. Its way to the outside must be there already, as it is when a
// pod starts.
func OpenLink() (*Link, error) {
	gateway, err := gateway()
	if err != nil {
		return nil, fmt.Errorf("find the way out: %w", err)
	}
	file, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	return &Link{file: file, gateway: gateway}, nil
}

// Close closes it.
func (l *Link) Close() error { return unix.Close(l.file) }

// Send sends a packet, from its IP header on, to the node.
func (l *Link) Send(packet []byte) error {
	to := l.gateway
	to.Protocol = bigEndian(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		to.Protocol = bigEndian(unix.ETH_P_IPV6)
	}
	return whileFull(func() error { return unix.Sendto(l.file, packet, 0, &to) })
}

// whileFull sends again while the device's queue is full.
func whileFull(send func() error) error {
	for range 1000 {
		err := send()
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("send a raw packet: %w", err)
		}
		time.Sleep(time.Millisecond)
	}
	return unix.ENOBUFS
}

func bigEndian(v uint16) uint16 { return v<<8 | v>>8 }

// gateway is the node's end of the link.
func gateway() (to unix.SockaddrLinklayer, err error) {
	routes, err := netlink.RouteGet(net.IPv4(192, 0, 2, 1))
	if err != nil {
		return to, err
	}
	out := routes[0]
	// The kernel asks for the neighbour when there is something to send.
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: out.Gw, Port: 9})
	if err != nil {
		return to, err
	}
	defer c.Close()
	if _, err := c.Write(nil); err != nil {
		return to, err
	}
	for range 100 {
		neighbours, err := netlink.NeighList(out.LinkIndex, netlink.FAMILY_V4)
		if err != nil {
			return to, err
		}
		for _, n := range neighbours {
			if n.IP.Equal(out.Gw) && len(n.HardwareAddr) == 6 {
				to = unix.SockaddrLinklayer{Ifindex: out.LinkIndex, Halen: 6}
				copy(to.Addr[:], n.HardwareAddr)
				return to, nil
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return to, fmt.Errorf("%s does not say where it is", out.Gw)
}
