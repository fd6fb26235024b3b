package proxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"time"
)

type peerKey struct{}

// withPeer notes once per connection who is at its other end. This is the whole of the caller's identity: the kernel of
// the node vouches for the source address (the redirect's INPUT rule admits only connections that were redirected here),
// and nothing that the client writes can change it. That takes listeners without multipath TCP, which Go's have unless told
// otherwise: such a connection's address is its first path's, and another path may be another pod's. X-Forwarded-For and its like
// are never read for identity.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	p := &atPeer{ip: addrOf(c.RemoteAddr())}
	p.conn, _ = c.(*conn)
	return context.WithValue(ctx, peerKey{}, p)
}

// atPeer is the connection to a peer.
type atPeer struct {
	ip   netip.Addr
	conn *conn // nil in handlers that run without Serve
}

// peer is the source address of the request's connection, unmapped. RemoteAddr is net/http's copy of the same address,
// for handlers that run without Serve.
func peer(r *http.Request) (netip.Addr, *conn) {
	if p, ok := r.Context().Value(peerKey{}).(*atPeer); ok {
		return p.ip, p.conn
	}
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}, nil
	}
	return sourceOf(ap.Addr()), nil
}

func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return sourceOf(tcp.AddrPort().Addr())
	}
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	return sourceOf(ap.Addr())
}

// sourceOf is the address by which a peer is known: unmapped, and of the link-local ones of IPv6 one for the whole link. They are no
// pod's identity, and whoever is on a link has as many of them as it likes: each would have a share of what the pods have to share.
func sourceOf(ip netip.Addr) netip.Addr {
	if ip = ip.Unmap(); ip.Is6() && ip.IsLinkLocalUnicast() {
		return netip.AddrFrom16([16]byte{0xfe, 0x80}).WithZone(ip.Zone())
	}
	return ip
}

// identify looks up anew for every request who holds the source IP, and waits for it if need be. held says that it waited. From then
// on the connection is that pod's, and is reset when the IP is another's.
func (q request) identify() (c *Caller, held bool, err error) {
	for {
		moves := q.conn.moves()
		if c, held, err = q.find(); err != nil || q.conn.belongs(c, moves) {
			return c, held, err
		}
	}
}

func (q request) find() (c *Caller, held bool, err error) {
	c, err = q.s.callers.Find(q.ip)
	if err == nil {
		return c, false, nil
	}
	ctx, cancel := q.context()
	defer cancel()
	start := time.Now()
	c, err = q.s.callers.Wait(ctx, q.ip)
	q.s.metrics.identifyWait.Observe(time.Since(start).Seconds())
	return c, true, err
}

// context ends with the request's one deadline, or when the client leaves.
func (q request) context() (context.Context, context.CancelFunc) {
	if q.conn != nil {
		q.conn.deadlines.beginLookout()
	}
	return context.WithDeadline(q.r.Context(), q.start.Add(q.s.hold))
}
