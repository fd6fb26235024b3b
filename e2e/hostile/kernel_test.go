package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const impatient = 700 * time.Millisecond

// tryDial returns the connection, or nil.
func tryDial(t testing.TB, p *lab.Pod, to string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), impatient)
	defer cancel()
	c, err := p.Dial(ctx, "tcp", to)
	if err != nil {
		return nil
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// mustDial is tryDial for what must be there, on a machine as busy as it may be.
func mustDial(t testing.TB, p *lab.Pod, to string) (c net.Conn) {
	t.Helper()
	eventually(t, func() error {
		if c = tryDial(t, p, to); c == nil {
			return fmt.Errorf("%s does not answer", to)
		}
		return nil
	})
	return c
}

// in runs a command in a pod.
func in(t testing.TB, p *lab.Pod, name string, args ...string) string {
	t.Helper()
	out, err := p.Command(labtest.Context(t), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v %s", name, args, err, out)
	}
	return string(out)
}

// on runs a command on the node.
func (s *stage) on(t testing.TB, script string) string {
	t.Helper()
	out, err := s.Run(labtest.Context(t), "sh", "-ec", script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The daemon's own ports, at the node's own addresses: neither that of this node nor another's answers whoever was not
// redirected there, whatever the pod's kernel does with its packets first. (S13)
func TestHostileDirectPorts(t *testing.T) {
	t.Parallel()
	s, other := newStage(t, lab.NodeOptions{}), newStage(t, lab.NodeOptions{})
	var targets []string
	for _, n := range []*stage{s, other} {
		for _, ip := range n.Addrs() {
			targets = append(targets, at(ip, 8254), at(ip, 8255))
		}
	}
	refused := func(how string) {
		t.Helper()
		for _, to := range targets {
			if c := tryDial(t, s.mallory, to); c != nil {
				t.Errorf("%s: %s accepts", how, to)
			}
		}
	}
	refused("plainly")
	// A connection that is redirected makes an entry in the node's conntrack; the same port of the pod's is no way in.
	c := mustDial(t, s.mallory, endpoint)
	local := c.LocalAddr().(*net.TCPAddr).Port
	err := s.mallory.Net.Do(func() error {
		d := net.Dialer{Timeout: impatient, Control: reuse, LocalAddr: &net.TCPAddr{Port: local, IP: s.mallory.IPs[0].AsSlice()}}
		direct, err := d.Dial("tcp", at(s.IP, 8254))
		if err == nil {
			direct.Close()
			return errors.New("the port of a redirected connection opens the daemon's own")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	// The pod translates by itself.
	in(t, s.mallory, "iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "192.0.2.1", "--dport", "80", "-j", "DNAT", "--to-destination", at(s.IP, 8254))
	if c := tryDial(t, s.mallory, "192.0.2.1:80"); c != nil {
		t.Error("the pod's own translation opens the daemon's port")
	}
	if err := s.own(labtest.Context(t), s.mallory); err != nil {
		t.Error(err)
	}
	s.untouched(t)
}

// reuse lets two connections have the same local port.
func reuse(_, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, set)
}

// A second instance listens for a moment before the rules know its port. Whoever finds it is told who they are by their
// address, as ever, and gets their own.
func TestHostileNewcomersPort(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	// It never gets as far as the rules: nobody redirects there.
	labtest.Launch(t, s.Node, lab.DaemonOptions{OpsPort: 9191, Flags: []string{
		"-issuer", "web-identity", "-redirect", "none", "-guard=false", "-port", "8300", "-debug-addr", "", "-state-dir", "",
	}})
	for p, want := range map[*lab.Pod]string{s.mallory: "mallory-role", s.victim: "victim-role"} {
		eventually(t, func() error {
			answer, err := speak(labtest.Context(t), p, at(s.IP, 8300), "GET "+list+"/"+v1+host+"X-Real-IP: "+s.victim.IPs[0].String()+"\r\nConnection: close\r\n\r\n")
			if err == nil && !strings.HasSuffix(answer, "\r\n\r\n"+want) {
				err = fmt.Errorf("%s is answered %s", p.Name, answer)
			}
			return err
		})
	}
	s.untouched(t)
}

// What a pod gets from the operator's ports: health and metrics that name nobody, and nothing of the debug listener, even on
// a node that routes 127.0.0.0/8 (as kube-proxy lets it). (S16)
func TestHostileOperatorPorts(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{}, "-pprof")
	for _, ip := range s.Addrs() {
		for _, path := range []string{"/metrics", "/healthz", "/readyz", "/", "/debug/pods", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline", "/debug/vars", "/../debug/pods", "/metrics/../debug/pods"} {
			answer, err := speak(ctx, s.mallory, at(ip, 9181), "GET "+path+v1+"Host: x\r\nConnection: close\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			found := strings.HasPrefix(answer, "HTTP/1.1 200 ")
			if known := slices.Contains([]string{"/metrics", "/healthz", "/readyz"}, path); found != known {
				t.Errorf("%s is answered %.200s", path, answer)
			}
			if err := s.stolen(s.none, answer); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			for _, private := range []string{"victim", s.namespace, s.victim.IPs[0].String(), s.victim.Name, "arn:aws", "AKIA", "ASIA"} {
				if strings.Contains(answer, private) {
					t.Errorf("%s tells a pod of %q", path, private)
				}
			}
		}
		if c := tryDial(t, s.mallory, at(ip, 9182)); c != nil {
			t.Errorf("the debug listener accepts at %s", ip)
		}
	}
	// A pod that wants all of the ops port does not take it from Prometheus, nor the daemon's memory and files.
	for range 400 {
		if c, err := s.mallory.Dial(ctx, "tcp", at(s.IP, 9181)); err == nil {
			defer c.Close()
		}
	}
	if _, err := ask(ctx, s.victim, http.MethodGet, "/latest/meta-data/placement/region", nil); err != nil {
		t.Error(err)
	}
	if _, err := s.daemon.Metrics(ctx); err != nil {
		t.Errorf("the node itself: %v", err)
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.daemon.PID()))
	if err != nil || len(files) > 150 {
		t.Errorf("the daemon holds %d files: %v", len(files), err)
	}
	// The pod sends to the node's 127.0.0.1, which a node with route_localnet takes.
	s.on(t, "sysctl -qw net.ipv4.conf.all.route_localnet=1")
	in(t, s.mallory, "sh", "-ec", `sysctl -qw net.ipv4.conf.all.route_localnet=1; ip addr del 127.0.0.1/8 dev lo; ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null || true
		ip route add 127.0.0.1/32 via $(ip -4 route show default | cut -d' ' -f3) src `+s.mallory.IPs[0].String())
	ln, err := s.Net.Listen(ctx, "tcp", "127.0.0.1:7777")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	mustDial(t, s.mallory, "127.0.0.1:7777") // the node routes its loopback to pods: otherwise the rest would prove nothing
	for _, path := range []string{"/", "/debug/pods", "/debug/pprof/heap"} {
		if c := tryDial(t, s.mallory, "127.0.0.1:9182"); c != nil {
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:9182\r\nConnection: close\r\n\r\n", path)
			if answer, _ := io.ReadAll(c); len(answer) > 0 {
				t.Errorf("over the node's loopback a pod gets %s: %.200s", path, answer)
			}
		}
	}
	if _, err := s.daemon.Debug(ctx, "/debug/pods"); err != nil {
		t.Errorf("the node itself: %v", err)
	}
	if c := tryDial(t, s.mallory, "127.0.0.1:8254"); c != nil {
		t.Error("the pod-facing port accepts on the loopback")
	}
	s.untouched(t)
}

// A pod that is root of its own network namespace: addresses, routes, translations and policies of its own change what it
// itself sees, and nothing else. (a bind or a route of the endpoint inside the pod)
func TestHostileOwnNetwork(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"on the link":         `ip route replace 169.254.169.254/32 dev eth0; ip -6 route replace fd00:ec2::254/128 dev eth0`,
		"on the link, known":  `ip route replace 169.254.169.254/32 dev eth0; ip neigh replace 169.254.169.254 lladdr $(ip neigh show dev eth0 | grep -o '[0-9a-f:]\{17\}' | head -1) dev eth0`,
		"translated":          `iptables -t nat -A OUTPUT -p tcp -d 198.51.100.7 --dport 81 -j DNAT --to-destination 169.254.169.254:80`,
		"another source port": `iptables -t nat -A POSTROUTING -p tcp -d 169.254.169.254 -j MASQUERADE --to-ports 80`,
		"marked":              `iptables -t mangle -A OUTPUT -j MARK --set-mark 0x4000; iptables -t mangle -A OUTPUT -j TOS --set-tos 0x10`,
		"own policy":          `ip rule add priority 0 to 169.254.169.254 lookup main; ip rule add fwmark 1 lookup local`,
		"forwarding":          `sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			s := newStage(t, lab.NodeOptions{})
			s.on(t, "sysctl -qw net.ipv4.conf.all.proxy_arp=1 net.ipv6.conf.all.proxy_ndp=1") // as Calico has it
			in(t, s.mallory, "sh", "-ec", script)
			for _, to := range []string{endpoint, endpoint6, "198.51.100.7:81", "169.254.169.254:81"} {
				c := tryDial(t, s.mallory, to)
				if c == nil {
					continue
				}
				fmt.Fprint(c, "GET /latest/user-data HTTP/1.0\r\n\r\nGET "+list+"/"+lab.NodeRole+" HTTP/1.0\r\n\r\n")
				answer, _ := io.ReadAll(c)
				if err := s.stolen(s.mallory, string(answer)); err != nil {
					t.Errorf("%s: %v", to, err)
				}
			}
			if err := s.own(ctx, s.victim); err != nil {
				t.Error(err)
			}
			s.untouched(t)
		})
	}
	t.Run("its own endpoint", func(t *testing.T) {
		t.Parallel()
		ctx := labtest.Context(t)
		s := newStage(t, lab.NodeOptions{})
		in(t, s.mallory, "sh", "-ec", "ip addr add 169.254.169.254/32 dev lo; ip addr add fd00:ec2::254/128 dev lo nodad; ip addr add 169.254.169.254/32 dev eth0")
		ln, err := s.mallory.Net.Listen(ctx, "tcp", endpoint)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		came := make(chan net.Addr, 10)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				came <- c.RemoteAddr()
				c.Close()
			}
		}()
		// It tells everybody on its link.
		w := newWire(t, s.mallory)
		if err := w.send(header(imds.IPv4, s.IP, unix.IPPROTO_UDP, 1, 0, nil, make([]byte, 8))); err != nil {
			t.Log(err)
		}
		for range 3 {
			if err := s.own(ctx, s.victim); err != nil {
				t.Errorf("another pod: %v", err)
			}
		}
		if _, err := s.Run(ctx, "sh", "-c", "ip neigh flush all; ip route flush cache"); err != nil {
			t.Fatal(err)
		}
		if _, err := ask(ctx, s.victim, http.MethodGet, "/latest/meta-data/placement/region", nil); err != nil {
			t.Errorf("the daemon does not reach the real endpoint: %v", err)
		}
		select {
		case from := <-came:
			t.Errorf("%s was led to the pod", from)
		default:
		}
		s.untouched(t)
	})
}

// Packets that no socket makes: every protocol, every port, fragments, source routes, tunnels, extension headers, sent with and
// without the pod's own routing. None arrives, and an ICMP redirect moves neither the node nor anybody's traffic. (S12)
func TestHostileRawPackets(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]lab.NodeOptions{"ptp": {}, "bridge": {Network: lab.Bridge}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			s := newStage(t, o)
			w := newWire(t, s.mallory)
			packets := Packets(Place{
				Pod: s.mallory.IPs[0], Pod6: s.mallory.IPs[1], Node: s.IP, Node6: s.IPv6, Gateway: s.IP, Neighbour: s.victim.IPs[0],
			})
			var link *Link
			if err := s.mallory.Net.Do(func() (err error) {
				link, err = OpenLink()
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer link.Close()
			for how, send := range map[string]func([]byte) error{"raw sockets": w.send, "the link": link.Send} {
				sent, unsent := 0, 0
				for _, b := range packets {
					if err := send(b); err != nil { // the pod's own kernel may refuse to send it
						unsent++
					} else {
						sent++
					}
				}
				t.Logf("%d packets sent over %s, %d not", sent, how, unsent)
				if sent < 10_000 {
					t.Errorf("only %d packets were sent over %s", sent, how)
				}
			}
			if _, err := ask(ctx, s.victim, http.MethodGet, "/latest/meta-data/placement/region", nil); err != nil {
				t.Errorf("the daemon does not reach the real endpoint: %v", err)
			}
			for _, p := range []*lab.Pod{s.mallory, s.victim} {
				if err := s.own(ctx, p); err != nil {
					t.Error(err)
				}
			}
			s.untouched(t)
		})
	}
}

// A pod takes another's address as its source, while that one is there and after it has gone. On links of their own (ptp,
// VPC CNI, Calico) the answers go to the address's holder, so that not even a handshake completes: reverse path filtering
// adds nothing to that, and is not asked for. (S13)
func TestHostileSpoofedSource(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]lab.NodeOptions{"loose": {}, "strict rp_filter": {RPFilter: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			s := newStage(t, o)
			spoof := func(state string, victim *lab.Pod) {
				t.Helper()
				for i, ip := range victim.IPs {
					to := []string{endpoint, endpoint6}[i]
					in(t, s.mallory, "ip", "addr", "add", netip.PrefixFrom(ip, ip.BitLen()).String(), "dev", "eth0", "noprefixroute")
					err := s.mallory.Net.Do(func() error {
						d := net.Dialer{Timeout: impatient, LocalAddr: &net.TCPAddr{IP: ip.AsSlice()}}
						c, err := d.DialContext(ctx, "tcp", to)
						if err == nil {
							c.Close()
							return fmt.Errorf("%s: a connection to %s with the address %s of another pod", state, to, ip)
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
					in(t, s.mallory, "ip", "addr", "del", netip.PrefixFrom(ip, ip.BitLen()).String(), "dev", "eth0")
				}
			}
			spoof("while it is there", s.victim)
			if err := s.own(ctx, s.victim); err != nil {
				t.Errorf("the pod itself: %v", err)
			}
			s.untouched(t)
			requests := len(shared.IMDS.Requests(s.Addrs()...))
			if err := s.victim.Unplug(); err != nil {
				t.Fatal(err)
			}
			spoof("when it has gone", s.victim)
			// Addresses that name nobody's pod: the node's own, the loopback, the endpoint's, another node's network.
			w := newWire(t, s.mallory)
			for _, from := range []netip.Addr{s.IP, netip.MustParseAddr("127.0.0.1"), imds.IPv4, netip.MustParseAddr("10.244.200.7"), netip.MustParseAddr("0.0.0.0")} {
				for _, port := range []uint16{80, 81} {
					dst := netip.AddrPortFrom(imds.IPv4, port)
					if err := w.send(header(from, imds.IPv4, unix.IPPROTO_TCP, 9, 0, nil, segment(netip.AddrPortFrom(from, 6000), dst, synFlag, 1, 0))); err != nil {
						t.Log(err)
					}
				}
			}
			// What the daemon answered to an address that nobody has now, the node reports to the sender by ICMP, and answers to the
			// endpoint's own address go there: not more.
			var pods []netip.Addr
			for p := range s.roles {
				pods = append(pods, p.IPs...)
			}
			packets, err := shared.IMDS.Packets(ctx, append(pods, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.244.200.7"))...)
			if err != nil || len(packets) > 0 {
				t.Errorf("a pod reached the endpoint: %v %v", packets, err)
			}
			if after := len(shared.IMDS.Requests(s.Addrs()...)); after != requests {
				t.Errorf("%d requests of the node's came to the endpoint", after-requests)
			}
		})
	}
}

// An address goes from one pod to the next while the first still has a connection. Every request is asked who it comes from
// anew, and what the first one writes is answered to nobody.
func TestHostileKeptAlive(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	request := "GET " + list + "/" + v1 + host + "\r\n"
	c := mustDial(t, s.mallory, endpoint)
	answers := func(patience time.Duration) string {
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, request)
		b := make([]byte, 8<<10)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	if got := answers(10 * time.Second); !strings.HasSuffix(got, "mallory-role") {
		t.Fatalf("over its connection the pod is answered %q", got)
	}
	if err := s.mallory.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	// Its namespace and its link stay, as if the runtime were late; the node's route leads to the heir.
	arn, err := s.Role("heir-role")
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, s.namespace, "heir", map[string]string{"eks.amazonaws.com/role-arn": arn}); err != nil {
		t.Fatal(err)
	}
	s.on(t, "ip route del "+s.mallory.IPs[0].String())
	free := netip.MustParseAddr(s.mallory.IPs[0].String())
	heir := labtest.Pod(t, s.Node, lab.PodSpec{Namespace: s.namespace, ServiceAccount: "heir", Detached: true, IP: free})
	s.roles[heir] = arn
	for range 3 {
		if got := answers(impatient); strings.Contains(got, "heir-role") || accessKeys.MatchString(got) {
			t.Fatalf("the first holder of the address is answered %q", got)
		}
	}
	// With the link back at the first holder (a leaked route), the daemon knows the address as the heir's: it answers for the
	// heir, or nobody, never for the first.
	c2 := tryDial(t, s.mallory, endpoint)
	if c2 != nil {
		_, _ = io.WriteString(c2, request)
		b := make([]byte, 8<<10)
		n, _ := c2.Read(b)
		if strings.Contains(string(b[:n]), "mallory-role") {
			t.Errorf("a pod that is gone is answered %q", b[:n])
		}
	}
	s.untouched(t)
}

// A data path without conntrack, and so without the redirect; and a conntrack table that is full: refused, and well again
// afterwards. Nothing arrives.
func TestHostileConntrack(t *testing.T) {
	t.Parallel()
	t.Run("skipped", func(t *testing.T) {
		t.Parallel()
		s := newStage(t, lab.NodeOptions{})
		s.on(t, "iptables -t raw -I PREROUTING -d 169.254.169.254 -j CT --notrack; ip6tables -t raw -I PREROUTING -d fd00:ec2::254 -j CT --notrack")
		for _, to := range []string{endpoint, endpoint6} {
			if c := tryDial(t, s.mallory, to); c != nil {
				t.Errorf("%s accepts a connection that was not tracked", to)
			}
		}
		s.on(t, "iptables -t raw -F PREROUTING; ip6tables -t raw -F PREROUTING")
		if err := s.own(labtest.Context(t), s.victim); err != nil {
			t.Error(err)
		}
		s.untouched(t)
	})
	t.Run("full", func(t *testing.T) {
		t.Parallel()
		ctx := labtest.Context(t)
		s := newStage(t, lab.NodeOptions{IPv4Only: true})
		data, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
		if err != nil {
			t.Fatal(err)
		}
		var most int
		if _, err := fmt.Sscan(string(data), &most); err != nil || most > 1<<20 {
			t.Fatalf("a conntrack table of %d entries is too much to fill: %v", most, err)
		}
		s.on(t, "sysctl -qw net.netfilter.nf_conntrack_udp_timeout=60")
		w := newWire(t, s.mallory)
		to := netip.MustParseAddr("172.30.0.1")
		me := s.mallory.IPs[0]
		for i := range most + most/20 {
			udp := []byte{byte(i >> 8), byte(i), byte(0x40 + i>>16), 9, 0, 8, 0, 0}
			if err := w.send(header(me, to, unix.IPPROTO_UDP, uint16(i), 0, nil, udp)); err != nil {
				t.Fatal(err)
			}
		}
		var count int
		if _, err := fmt.Sscan(s.on(t, "cat /proc/sys/net/netfilter/nf_conntrack_count"), &count); err != nil || count < most*9/10 {
			t.Fatalf("the table has %d of %d entries: %v", count, most, err)
		}
		for _, port := range []uint16{80, 81} {
			if c := tryDial(t, s.mallory, at(imds.IPv4, port)); c != nil {
				_, _ = io.WriteString(c, get("/latest/user-data"))
				b := make([]byte, 4<<10)
				n, _ := c.Read(b)
				if err := s.stolen(s.mallory, string(b[:n])); err != nil {
					t.Errorf("port %d: %v", port, err)
				}
			}
		}
		t.Logf("the table has %d of %d entries; another pod meanwhile: %v", count, most, s.ownNow(ctx, s.victim))
		s.on(t, "conntrack -F >/dev/null 2>&1")
		if err := s.own(ctx, s.victim); err != nil {
			t.Error(err)
		}
		s.untouched(t)
	})
}

// An application that fetches what others name, as a reverse proxy, a browser or a webhook does: no token through a proxy,
// no credentials under another name, no redirect to follow, and none of the two requests by which pods of another system got
// past its proxy. (S11; DNS rebinding; CVE-2022-23551; CVE-2021-1677)
func TestHostileApplication(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{}, "-imdsv1=false")
	p := s.mallory
	// In the pod: what comes in is passed on to the endpoint, with X-Forwarded-For, as every proxy does.
	ln, err := p.Net.Listen(ctx, "tcp", at(p.IPs[0], 8080))
	if err != nil {
		t.Fatal(err)
	}
	to, err := url.Parse("http://" + endpoint)
	if err != nil {
		t.Fatal(err)
	}
	app := &http.Server{Handler: &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.SetXForwarded()
		},
		Transport: p.HTTP().Transport,
	}}
	go func() { _ = app.Serve(ln) }()
	defer app.Close()
	through := func(raw string) string {
		t.Helper()
		c := mustDial(t, s.victim, at(p.IPs[0], 8080))
		_, _ = io.WriteString(c, raw)
		answer, err := io.ReadAll(c)
		if err != nil || len(answer) == 0 {
			t.Fatal(err)
		}
		return string(answer)
	}
	own := token(t, p)
	for _, raw := range []string{
		"PUT /latest/api/token" + v1 + host + ttl + "60\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
		"GET " + list + "/" + v1 + host + "Connection: close\r\n\r\n",
		"GET " + list + "/mallory-role" + v1 + host + "Connection: close\r\n\r\n",
		"GET " + list + "/mallory-role" + v1 + host + session + own + "\r\nConnection: close\r\n\r\n", // even with a token that leaked
		"GET " + list + "/mallory-role" + v1 + "Host: rebound.example\r\n" + session + own + "\r\nConnection: close\r\n\r\n",
	} {
		answer := through(raw)
		if strings.HasPrefix(answer, "HTTP/1.1 2") || strings.HasPrefix(answer, "HTTP/1.1 3") || accessKeys.MatchString(answer) {
			t.Errorf("through the application %q is answered %s", raw, answer)
		}
	}
	// A page that was made to resolve its own name to the endpoint.
	for _, name := range []string{"rebound.example", "rebound.example:80", "169.254.169.254.nip.io", "localhost"} {
		for _, raw := range []string{
			"PUT /latest/api/token" + v1 + "Host: " + name + "\r\n" + ttl + "60\r\n\r\n", "GET " + list + "/mallory-role" + v1 + "Host: " + name + "\r\nOrigin: http://" + name + "\r\n" + session + own + "\r\n\r\n",
		} {
			answer, err := speak(ctx, p, endpoint, raw)
			if err != nil || !strings.HasPrefix(answer, "HTTP/1.1 403 ") {
				t.Errorf("%q is answered %v %s", raw, err, answer)
			}
		}
	}
	// Backslashes in the path were not recognised and passed on to the node's endpoint.
	for _, path := range []string{`/metadata/identity\oauth2\token/`, `/latest\meta-data\iam\security-credentials\` + lab.NodeRole, `/latest/meta-data\iam\security-credentials/` + lab.NodeRole, `/latest/api\token`, `\latest\user-data`, `/latest/user-data\`} {
		for _, method := range []string{"GET", "PUT", "POST"} {
			answer, err := speak(ctx, p, endpoint, method+" "+path+v1+host+"Metadata: true\r\n"+ttl+"60\r\n"+session+own+"\r\nContent-Length: 0\r\n\r\n")
			if err != nil || strings.HasPrefix(answer, "HTTP/1.1 2") {
				t.Errorf("%s %s is answered %v %s", method, path, err, answer)
			}
			if err := s.stolen(p, answer); err != nil {
				t.Error(err)
			}
		}
	}
	// The name of the pod and its namespace in headers decided whose identity it was.
	for _, h := range []string{"podname: " + s.victim.Name + "\r\npodns: " + s.namespace, "X-Pod-Name: " + s.victim.Name, "X-Forwarded-For: " + s.victim.IPs[0].String(), "X-Real-IP: " + s.victim.IPs[0].String()} {
		answer, err := speak(ctx, p, endpoint, "GET "+list+"/"+v1+host+session+own+"\r\n"+h+"\r\n\r\n")
		if err != nil || strings.Contains(answer, "victim-role") {
			t.Errorf("%q is answered %v %s", h, err, answer)
		}
	}
	s.untouched(t)
}
