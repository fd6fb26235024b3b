package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// No packet of a pod reaches the node's real metadata endpoint: with the daemon running, killed, starting, stopped, and with
// its rules flushed while it is gone.
func TestLabNothingReachesTheEndpoint(t *testing.T) {
	for name, o := range map[string]lab.NodeOptions{
		"ptp": {}, "ptp strict rp_filter": {RPFilter: true}, "bridge": {Network: lab.Bridge}, "v4 only": {IPv4Only: true},
		"masquerade": {Masquerade: true, IPv4Only: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, o)
			shop := shared.Unique("shop")
			role := serviceAccount(t, n, shop, "cart", "cart")
			pods := []*lab.Pod{
				labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}),
				labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "visitor"}),
			}
			untouched := func(state string) {
				t.Helper()
				// A masqueraded packet of a pod would look like the node's: then only what the node asked for tells.
				if err := n.Untouched(ctx, imds.Expected{}); err != nil {
					t.Fatalf("%s: %v", state, err)
				}
			}
			attackAll := func(state string) {
				t.Helper()
				for _, p := range pods {
					if err := attack(ctx, p); err != nil {
						t.Fatalf("%s: %v", state, err)
					}
				}
				untouched(state)
			}
			start := func() *lab.Daemon {
				return labtest.Launch(t, n, lab.DaemonOptions{Flags: []string{"-issuer", "web-identity"}})
			}
			served := func(state string) {
				t.Helper()
				var doc document
				labtest.Eventually(t, func() (err error) { // a daemon that has just started may have to wait for STS
					if _, doc, err = credentials(ctx, pods[0]); err != nil {
						err = fmt.Errorf("%s: %w", state, err)
					}
					return err
				})
				if err := owned(n, doc, role); err != nil {
					t.Fatalf("%s: %v", state, err)
				}
			}

			d := start()
			if err := d.WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			served("running")
			attackAll("running")

			d.Kill()
			attackAll("killed")
			pods = append(pods, labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}))
			attackAll("a pod that came when the daemon was dead")

			stop := hammer(ctx, pods)
			for range 2 {
				d = start()
				if err := d.WaitReady(ctx); err != nil {
					t.Fatal(err)
				}
				served("started again")
				d.Kill()
			}
			d = start()
			if err := d.WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			if err := d.Stop(ctx); err != nil {
				t.Error(err)
			}
			if err := stop(); err != nil {
				t.Fatalf("killed, starting, stopping: %v", err)
			}
			untouched("killed, starting, stopping")

			if _, err := n.Run(ctx, "sh", "-c", "iptables -t nat -F; iptables -F; ip6tables -t nat -F; ip6tables -F; true"); err != nil {
				t.Fatal(err)
			}
			if o.Masquerade {
				if err := n.Masquerade(ctx); err != nil {
					t.Fatal(err)
				}
			}
			attackAll("stopped, every iptables rule flushed")
		})
	}
}

// A connection to the real endpoint that is older than the first daemon of the node carries nothing more.
func TestLabOlderConnections(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	p := labtest.Pod(t, n, lab.PodSpec{})
	tok := token(t, p) // of the real endpoint: there is no daemon yet
	header := map[string]string{"X-Aws-Ec2-Metadata-Token": tok}
	status, body, err := ask(ctx, p, http.MethodGet, endpoint+"/latest/user-data", header)
	if err != nil || status != 200 || !strings.Contains(body, imds.Mark) {
		t.Fatalf("without a daemon the real endpoint answers %d %v %s", status, err, body)
	}
	before := len(shared.IMDS.Requests(p.IPs...))

	labtest.Daemon(t, n, "-issuer", "web-identity")
	packets, err := shared.IMDS.Packets(ctx, p.IPs...)
	if err != nil {
		t.Fatal(err)
	}
	// The client still has the connection and uses it first.
	status, body, err = ask(ctx, p, http.MethodGet, endpoint+"/latest/user-data", header)
	if err == nil && (status == 200 || strings.Contains(body, imds.Mark)) {
		t.Errorf("over the older connection the answer is %d: %s", status, body)
	}
	if after := len(shared.IMDS.Requests(p.IPs...)); after != before {
		t.Errorf("%d requests came over the older connection", after-before)
	}
	after, err := shared.IMDS.Packets(ctx, p.IPs...)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(after) != fmt.Sprint(packets) {
		t.Errorf("packets came after the daemon was ready: %v, before %v", after, packets)
	}
}

// hammer attacks from the pods until stop is called, which returns what went wrong.
func hammer(ctx context.Context, pods []*lab.Pod) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	errs := make([]error, len(pods))
	for i, p := range pods {
		wg.Go(func() {
			for ctx.Err() == nil && errs[i] == nil {
				errs[i] = attack(ctx, p)
			}
		})
	}
	return func() error {
		cancel()
		wg.Wait()
		return errors.Join(errs...)
	}
}

// attack tries what a pod can try to reach the real endpoint, and returns an error when an answer holds what is not the
// pod's. Whether a packet arrived the endpoint knows.
func attack(ctx context.Context, p *lab.Pod) error {
	const patience = 150 * time.Millisecond
	var wg sync.WaitGroup
	errc := make(chan error, 200)
	try := func(f func(ctx context.Context) error) {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			if err := f(ctx); err != nil {
				errc <- err
			}
		})
	}
	for _, ip := range []netip.Addr{imds.IPv4, imds.IPv6} {
		if ip.Is6() && len(p.IPs) == 1 {
			continue
		}
		try(func(ctx context.Context) error {
			if err := p.Ping(ctx, ip.String()); err == nil {
				return fmt.Errorf("%s answers pings", ip)
			}
			return nil
		})
		for _, network := range []string{"tcp", "udp"} {
			for _, port := range []uint16{1, 53, 80, 81, 443, 8254, 8255, 9181} {
				try(func(ctx context.Context) error {
					c, err := p.Dial(ctx, network, netip.AddrPortFrom(ip, port).String())
					if err != nil {
						return nil
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					io.WriteString(c, "GET /latest/user-data HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
					b, _ := io.ReadAll(c)
					return stolen(string(b))
				})
			}
		}
		for _, target := range []string{
			"PUT /latest/api/token", "GET /", "GET /latest/user-data", "GET /latest/meta-data/", "GET /2009-04-04/user-data", "GET //latest/user-data",
			"GET " + roleList, "GET " + roleList + lab.NodeRole, "GET /latest/meta-data/iam/info", "GET /latest/dynamic/instance-identity/pkcs7",
			"GET /latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", "GET /latest/meta-data/public-keys/0/openssh-key",
			"GET /latest/meta-data/placement/../iam/security-credentials/" + lab.NodeRole, "GET /latest/meta-data/tags/instance/Name",
		} {
			try(func(ctx context.Context) error {
				c, err := p.Dial(ctx, "tcp", netip.AddrPortFrom(ip, 80).String())
				if err != nil {
					return nil
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(4 * patience))
				fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: %s\r\nX-Aws-Ec2-Metadata-Token-Ttl-Seconds: 60\r\nConnection: close\r\n\r\n", target, hostHeader(ip))
				b, _ := io.ReadAll(c)
				return stolen(string(b))
			})
		}
	}
	wg.Wait()
	close(errc)
	var errs []error
	for err := range errc {
		errs = append(errs, fmt.Errorf("pod %s/%s: %w", p.Namespace, p.Name, err))
	}
	return errors.Join(errs...)
}

func hostHeader(ip netip.Addr) string {
	return strings.TrimSuffix(net.JoinHostPort(ip.String(), ""), ":")
}

// stolen tells when an answer holds what belongs to the node: a marked value, or its role in the place of the pod's.
func stolen(answer string) error {
	_, body, ok := strings.Cut(answer, "\r\n\r\n")
	if !ok {
		body = answer
	}
	if strings.Contains(answer, imds.Mark) || strings.Contains(answer, "instance-profile/"+lab.NodeRole) || body == lab.NodeRole {
		return fmt.Errorf("an answer holds what is the node's: %s", answer)
	}
	return nil
}
