package e2e_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// An IP goes from a pod to the next, with every state of the earlier one: the credentials are the present holder's.
func TestLabReusedIP(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	for name, end := range map[string]func(p *lab.Pod) error{
		"terminating": func(p *lab.Pod) error { return p.Terminate(ctx) },
		"succeeded":   func(p *lab.Pod) error { return p.SetStatus(ctx, corev1.PodSucceeded, p.IPs...) },
		"failed":      func(p *lab.Pod) error { return p.SetStatus(ctx, corev1.PodFailed, p.IPs...) },
		"deleted":     func(p *lab.Pod) error { return p.Delete(ctx) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := labtest.Node(t, shared, lab.NodeOptions{})
			labtest.Daemon(t, n, "-issuer", "web-identity")
			shop := shared.Unique("shop")
			oldRole, newRole := serviceAccount(t, n, shop, "old", "old"), serviceAccount(t, n, shop, "new", "new")
			earlier := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "old"})
			served(t, n, earlier, oldRole)
			if err := end(earlier); err != nil {
				t.Fatal(err)
			}
			if name == "terminating" { // its containers still run
				_, doc, err := credentials(ctx, earlier)
				if err == nil {
					err = owned(n, doc, oldRole)
				}
				if err != nil {
					t.Errorf("while it terminates: %v", err)
				}
			} else {
				labtest.Eventually(t, func() error { return wantStatus(earlier, roleList, 503) })
			}

			if err := earlier.Unplug(); err != nil {
				t.Fatal(err)
			}
			later := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "new", IP: earlier.IPs[0]})
			if name == "terminating" { // until the daemon has heard of the later one, the address is the earlier one's
				labtest.Eventually(t, func() error {
					if status, body := get(t, later, roleList); status != http.StatusOK || body != "new" {
						return fmt.Errorf("the list is %d %s", status, body)
					}
					return nil
				})
			}
			served(t, n, later, newRole)
			labtest.Untouched(t, n, imds.Expected{})
		})
	}
}

// A session token lives as long as the pod that asked for it holds the IP, also over a crash of the daemon, whatever the pod's
// start time says.
func TestLabSessionTokens(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	serviceAccount(t, n, shop, "cart", "cart")
	use := func(p *lab.Pod, token string, want int) {
		t.Helper()
		status, body, err := ask(ctx, p, http.MethodGet, endpoint+roleList, map[string]string{"X-Aws-Ec2-Metadata-Token": token})
		if err != nil || status != want {
			t.Errorf("a list with the token is answered %d, want %d: %v %s", status, want, err, body)
		}
	}
	listed := func(p *lab.Pod) {
		t.Helper()
		labtest.Eventually(t, func() error { return wantStatus(p, roleList, 200) })
	}
	pod := func(s lab.PodSpec) *lab.Pod {
		t.Helper()
		s.Namespace, s.ServiceAccount = shop, "cart"
		p := labtest.Pod(t, n, s)
		listed(p)
		return p
	}
	earlier := pod(lab.PodSpec{})
	old := token(t, earlier)
	use(earlier, old, 200)

	// Skewed clocks and long waits before the start: a fresh token always works.
	for what, start := range map[string]time.Time{
		"started two hours ago": time.Now().Add(-2 * time.Hour), "starts in two hours": time.Now().Add(2 * time.Hour),
	} {
		p := pod(lab.PodSpec{StartTime: start})
		fresh := token(t, p)
		use(p, fresh, 200)
		if t.Failed() {
			t.Fatalf("the pod %s", what)
		}
	}
	pending := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Pending: true})
	early := token(t, pending) // its PUT may come before its status
	if err := pending.SetRunning(ctx); err != nil {
		t.Fatal(err)
	}
	listed(pending)
	use(pending, early, 200)

	// SIGKILL.
	d.Kill()
	d2, err := d.Again(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := d2.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	listed(earlier)
	use(earlier, old, 200)

	// The next holder of the IP. Its start is in another second than the token's issue: seconds are what status tells.
	if err := earlier.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	if err := earlier.Unplug(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
	later := pod(lab.PodSpec{IP: earlier.IPs[0]})
	use(later, old, 401)
	use(later, token(t, later), 200)
	// A token is the IP's that asked for it.
	use(later, token(t, pending), 401)
}

// The pod-facing port is closed to whoever was not redirected there, and pods in the node's network are nobody.
func TestLabOwnPort(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	hostPod := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", HostNetwork: true})
	served(t, n, p, role)
	other := labtest.Node(t, shared, lab.NodeOptions{})
	for what, dial := range map[string]*lab.Namespace{"a pod": p.Net, "the node": hostPod.Net, "another node": other.Net} {
		for _, ip := range n.Addrs() {
			c, err := dial.Dial(ctx, "tcp", netip.AddrPortFrom(ip, 8254).String())
			if err == nil {
				c.Close()
				t.Errorf("%s can connect to %s port 8254", what, ip)
			}
		}
	}
	// The real endpoint is a host network pod's: nothing here stands between. But it has no pod's credentials.
	status, body, err := ask(ctx, hostPod, http.MethodGet, endpoint+roleList, nil)
	if err != nil || status != http.StatusUnauthorized {
		t.Errorf("a host network pod is answered %d %v %s, want the real endpoint's 401", status, err, body)
	}
}

// STS fails in every way. What is cached is served while it may be, what is not is refused, and all is well once STS is.
func TestLabSTSFaults(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]aws.Fault{
		"throttled": aws.Throttled(), "unavailable": aws.Unavailable(), "hangs": {Hang: true}, "hangs up": {Hangup: true}, "slow": {Delay: time.Minute},
		"dead": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
			labtest.Daemon(t, n, "-issuer", "web-identity")
			shop := shared.Unique("shop")
			warmRole, coldRole := serviceAccount(t, n, shop, "warm", "warm"), serviceAccount(t, n, shop, "cold", "cold")
			warm := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "warm"})
			first := served(t, n, warm, warmRole)

			heal := func() error { return nil }
			if name == "dead" {
				if err := n.AWS.Kill(); err != nil {
					t.Fatal(err)
				}
				heal = n.AWS.Start
			} else {
				fault.Operation = "AssumeRoleWithWebIdentity"
				remove := n.AWS.Inject(fault)
				heal = func() error { remove(); return nil }
			}
			cold := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cold"})
			for range 3 {
				soon(t, "a refusal with nothing cached", hold+250*time.Millisecond, func() {
					resp, err := getResponse(ctx, cold, roleList)
					if err != nil {
						t.Fatal(err)
					}
					if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
						t.Errorf("with nothing cached the answer is %s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
					}
				})
				// A session token still comes at once.
				soon(t, "a session token", 250*time.Millisecond, func() { token(t, cold) })
				if _, doc, err := credentials(ctx, warm); err != nil || doc.AccessKeyId != first.AccessKeyId {
					t.Errorf("what is cached is not served: %v", err)
				}
			}
			if err := heal(); err != nil {
				t.Fatal(err)
			}
			served(t, n, cold, coldRole)
		})
	}
}

// With STS dead, credentials are served until a minute before they expire, and not a second longer.
func TestLabLastMinute(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	n.AWS.SetSessionLength(70 * time.Second)
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	served(t, n, p, role)
	if err := n.AWS.Kill(); err != nil {
		t.Fatal(err)
	}
	times := 0
	labtest.Eventually(t, func() error {
		_, doc, err := credentials(ctx, p)
		if err != nil {
			return wantStatus(p, roleList, 503)
		}
		times++
		if left := time.Until(doc.Expiration); left < 59*time.Second { // expirations are whole seconds
			t.Fatalf("credentials are served that expire in %v", left)
		}
		return fmt.Errorf("still served")
	})
	if times < 10 {
		t.Errorf("served %d times only", times)
	}
	if err := n.AWS.Start(); err != nil {
		t.Fatal(err)
	}
	served(t, n, p, role)
}
