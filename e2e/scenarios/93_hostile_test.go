package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/hostile"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// What package hostile does from network namespaces, these scenarios do from containers of a real runtime, behind real CNI plugins
// and kube-proxies, against the chart's daemon: whatever an attack needs, such as raw sockets, is what containers have by default.

const (
	nodeEndpoint = "169.254.169.254:80"
	nodeRole     = "node-role"
	issuer       = `flags.issuer="web-identity"`
)

// play is a hostile scenario: on each node a pod of mallory and one of the victim, who have a role each, and one of nobody, who has
// none. The daemons need no credentials of the nodes, so nothing but what the table passes on may reach the real endpoint.
type play struct {
	*scenario
	namespace string
	roles     map[string]string     // by account
	ips       map[string]netip.Addr // by pod
	daemons   map[string]int32
}

var accounts = []string{"mallory", "victim", "nobody"}

// actor is the name of an account's pod on a node.
func actor(account string, node int) string { return account + strconv.Itoa(node) }

func beginPlay(t *testing.T, ns string, limit time.Duration) *play {
	t.Helper()
	s := beginScenario(t, limit)
	s.install(issuer)
	for node := 1; node <= 2; node++ {
		s.daemon(node) // alone: one that ends may still use the node's role
	}
	s.sealed()
	s.breach()
	s.expected = imds.Expected{}
	p := &play{scenario: s, namespace: ns, roles: map[string]string{}, ips: map[string]netip.Addr{}, daemons: map[string]int32{}}
	p.daemons = p.restarts()
	s.newNamespace(ns, nil)
	for _, account := range accounts {
		if account != "nobody" {
			p.roles[account] = s.role(ns + "/" + account)
		}
		s.serviceAccount(ns, account, p.roles[account])
		for node := 1; node <= 2; node++ {
			s.create(podSpec{namespace: ns, name: actor(account, node), account: account, node: node, args: []string{"idle"}, edit: func(o *corev1.Pod) {
				if account == "victim" { // mallory's is not, and so weighs next to nothing
					o.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m")}
				}
			}})
		}
	}
	for _, account := range accounts {
		for node := 1; node <= 2; node++ {
			name := actor(account, node)
			p.ips[name] = netip.MustParseAddr(s.waitPod(ns, name, running).Status.PodIP)
		}
	}
	p.allServed()
	return p
}

// restarts of the daemons' containers, by pod.
func (p *play) restarts() map[string]int32 {
	p.Helper()
	list, err := p.kube.CoreV1().Pods(namespace).List(p.ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + release})
	p.must(err)
	all := map[string]int32{}
	for _, d := range list.Items {
		if d.DeletionTimestamp != nil {
			continue
		}
		for _, c := range d.Status.ContainerStatuses {
			all[d.Name] += c.RestartCount
		}
	}
	return all
}

// unharmed fails unless the daemons that were there at the beginning still serve, and never crashed, and everybody has their own.
func (p *play) unharmed() {
	p.Helper()
	p.allServed()
	if diff := cmp.Diff(p.daemons, p.restarts()); diff != "" {
		p.Errorf("the daemons' restarts (-before +after):\n%s", diff)
	}
}

// allServed fails unless everybody has their own credentials, and nobody none.
func (p *play) allServed() {
	p.Helper()
	for node := 1; node <= 2; node++ {
		for account, role := range p.roles {
			var first sequence.Result
			p.askUntil(p.namespace, actor(account, node), account+" is served", func(r sequence.Result) bool {
				first = r
				return r.Kind == sequence.OK
			})
			p.holds(first, role)
			p.holds(p.ask(p.namespace, actor(account, node)), role)
		}
		p.askUntil(p.namespace, actor("nobody", node), "nobody has no role", func(r sequence.Result) bool { return r.Kind == sequence.Status && r.Code == 404 })
	}
}

// attack runs the attacker in a pod and reads what it writes.
func (p *play) attack(pod string, out any, args ...string) error {
	text, err := p.tryKubectl(append([]string{"-n", p.namespace, "exec", pod, "--", "/attacker"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), out)
}

// names are what a pod's requests are about.
func (p *play) names(node int) string {
	p.Helper()
	b, err := json.Marshal(hostile.Names{
		Own: "mallory", OwnPath: p.namespace + "/mallory", Other: "victim", Node: nodeRole,
		OtherIP: p.ips[actor("victim", node)].String(), NodeIP: control.NodeIP(node).String(),
	})
	p.must(err)
	return string(b)
}

// The corpus of requests, from a pod with a role behind the bridge and from one without behind ptp: no credentials but the pod's own,
// none at all, no request at the real endpoint that the table did not build.
func TestScenarioHostileRequests(t *testing.T) {
	p := beginPlay(t, "hostile-requests", 4*time.Minute)
	pods := map[string]int{"mallory": 1, "nobody": 2}
	outcomes := map[string]*hostile.Outcome{}
	var g errgroup.Group
	for account, node := range pods {
		o := &hostile.Outcome{}
		outcomes[account] = o
		names := p.names(node)
		g.Go(func() error { return p.attack(actor(account, node), o, "requests", nodeEndpoint, names) })
	}
	p.must(g.Wait())
	for account, o := range outcomes {
		if err := o.Check(); err != nil {
			t.Errorf("%s: %v", account, err)
		}
		if o.Requests < 500 {
			t.Errorf("%s sent %d requests", account, o.Requests)
		}
		if (len(o.Keys) > 0) != (p.roles[account] != "") {
			t.Errorf("%s was given %d sessions", account, len(o.Keys))
		}
		for key, request := range o.Keys {
			if owner := p.owner(key); owner.RoleARN != p.roles[account] || owner.NodeIndex != 0 {
				t.Errorf("%s was given the credentials of %+v by %s", account, owner, request)
			}
		}
	}
	p.unharmed()
	p.figures("%d requests each of a pod with a role and of one without: answers %v and %v", outcomes["mallory"].Requests, outcomes["mallory"].Statuses, outcomes["nobody"].Statuses)
}

// Packets that no socket makes, over the link of a container with what containers may do by default, with its own source and with
// that of another pod, on either node: none arrives, and nobody's way changes. The nodes route IPv6 for the time of it.
func TestScenarioHostilePackets(t *testing.T) {
	p := beginPlay(t, "hostile-packets", 3*time.Minute)
	for node := 1; node <= 2; node++ {
		p.routeIPv6(node)
	}
	sent := p.packets()
	if sent < 40_000 {
		t.Errorf("only %d packets were sent", sent)
	}
	p.unharmed()
	p.figures("of %d packets none arrived", sent)
}

// packets sends all of them from mallory's pods and returns how many.
func (p *play) packets() (sent int) {
	p.Helper()
	var counts [2][2]int
	var g errgroup.Group
	for node := 1; node <= 2; node++ {
		for i, source := range []string{"mallory", "victim"} {
			place, err := json.Marshal(hostile.Place{
				Pod: p.ips[actor(source, node)], Pod6: netip.MustParseAddr(fmt.Sprintf("fd00:244:%d::%d", node, 2+i)),
				Node: control.NodeIP(node), Node6: control.NodeIPv6(node),
				Gateway: netip.AddrFrom4([4]byte{10, 244, byte(node), 1}), Neighbour: p.ips[actor("victim", node)],
			})
			p.must(err)
			g.Go(func() error { return p.attack(actor("mallory", node), &counts[node-1][i], "packets", string(place)) })
		}
	}
	p.must(g.Wait())
	return counts[0][0] + counts[0][1] + counts[1][0] + counts[1][1]
}

// routeIPv6 makes a node of the IPv4 cluster one whose pods' IPv6 packets would reach the endpoint, until the scenario ends.
func (p *play) routeIPv6(node int) {
	p.Helper()
	const forwarding = "/proc/sys/net/ipv6/conf/all/forwarding"
	before := strings.TrimSpace(p.onNode(node, "cat", forwarding))
	address := control.NodeIPv6(node).String() + "/64"
	p.onNode(node, "sh", "-ec", fmt.Sprintf("echo 1 >%s; ip addr replace %s dev eth0 nodad; ip -6 route replace default via fd00:30::1", forwarding, address))
	p.Cleanup(func() {
		p.onNode(node, "sh", "-ec", fmt.Sprintf("ip -6 route del default via fd00:30::1; ip addr del %s dev eth0; echo %s >%s", address, before, forwarding))
	})
}

// What else of the nodes a pod can connect to, of its own and of the other: not the pod-facing port, whether plainly, by a Service
// whose endpoints somebody wrote by hand, or with the pod's port given out as the node's. The operator's port names nobody, the
// kubelet wants to know who asks, and the API server lets no Service lead to the endpoint. Whoever takes the node's port for their
// own pod, by a host port or an external IP, is sent nothing that is meant for the daemon.
func TestScenarioHostilePorts(t *testing.T) {
	p := beginPlay(t, "hostile-ports", 3*time.Minute)
	const hello = "GET / HTTP/1.0\r\n\r\n"
	say := func(from int, to, text string) (answer string, err error) {
		return answer, p.attack(actor("mallory", from), &answer, "say", to, text)
	}
	each := func(visit func(from int, node netip.Addr)) {
		for from := 1; from <= 2; from++ {
			for node := 1; node <= 2; node++ {
				visit(from, control.NodeIP(node))
			}
		}
	}
	each(func(from int, node netip.Addr) {
		for _, port := range []uint16{8254, 8255, 9182} {
			if answer, err := say(from, netip.AddrPortFrom(node, port).String(), hello); !unconnected(err) {
				t.Errorf("port %d of %s answers node %d's pod: %v %.200s", port, node, from, err, answer)
			}
		}
		for path, status := range map[string]string{"/metrics": "200", "/": "404", "/debug/pods": "404", "/debug/pprof/heap": "404"} {
			answer, err := say(from, netip.AddrPortFrom(node, 9181).String(), "GET "+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if err != nil || !strings.HasPrefix(answer, "HTTP/1.1 "+status+" ") {
				t.Errorf("%s of %s's operator's port: %v %.200s", path, node, err, answer)
			}
			for _, private := range []string{"mallory", "victim", p.namespace, p.ips["victim1"].String(), p.ips["victim2"].String(), "arn:aws", "ASIA"} {
				if strings.Contains(answer, private) {
					t.Errorf("%s of %s's operator's port tells of %q", path, node, private)
				}
			}
		}
		if answer, err := say(from, "tls://"+netip.AddrPortFrom(node, 10250).String(), "GET /pods HTTP/1.0\r\n\r\n"); err != nil || !strings.HasPrefix(answer, "HTTP/1.0 401 ") {
			t.Errorf("the kubelet of %s: %v %.200s", node, err, answer)
		}
	})

	p.refusesEndpoint()
	ports := map[int]int32{1: p.port(1), 2: p.port(2)}
	// The operator's port by way of the same Service says when kube-proxy has heard of it.
	for node := 1; node <= 2; node++ {
		name := fmt.Sprint("daemon", node)
		ip := p.service(name, control.NodeIP(node), map[string]int32{"daemon": ports[node], "operator": 9181})
		for from := 1; from <= 2; from++ {
			p.until("kube-proxy leads to "+name, func() bool {
				answer, err := say(from, ip+":9181", hello)
				return err == nil && strings.HasPrefix(answer, "HTTP/1.0 404 ")
			})
			if answer, err := say(from, fmt.Sprint(ip, ":", ports[node]), hello); !unconnected(err) {
				t.Errorf("a Service that leads to the port of node %d answers node %d's pod: %v %.200s", node, from, err, answer)
			}
		}
	}

	thief := func(name string, node int, edit func(*corev1.Pod)) {
		p.create(podSpec{
			namespace: p.namespace, name: name, account: "mallory", node: node, image: "test.local/probe:1", args: []string{"/attacker", "listen", "8080"},
			labels: map[string]string{"app": name}, edit: edit,
		})
		p.waitPod(p.namespace, name, running)
	}
	greeted := func() string {
		return p.kubectl("-n", p.namespace, "logs", "thief1") + p.kubectl("-n", p.namespace, "logs", "thief2")
	}
	// takes waits until the node's port is the thieves', and fails if anybody but mallory comes there.
	takes := func(how string, node int) {
		p.until(how, func() bool {
			answer, err := say(node, fmt.Sprint(control.NodeIP(node), ":", ports[node]), hello)
			return err == nil && strings.HasSuffix(answer, "mallory")
		})
		before := greeted()
		p.allServed()
		if diff := cmp.Diff(before, greeted()); diff != "" {
			t.Errorf("%s: what is meant for the daemon of node %d leads to mallory's pod:\n%s", how, node, diff)
		}
	}
	for node := 1; node <= 2; node++ {
		thief(actor("thief", node), node, func(o *corev1.Pod) {
			o.Spec.Containers[0].Ports = []corev1.ContainerPort{
				{ContainerPort: 8080, HostPort: ports[node]}, {ContainerPort: 8080, HostPort: 80, HostIP: imds.IPv4.String()},
			}
		})
	}
	for node := 1; node <= 2; node++ {
		takes("host port", node)
	}
	for node := 1; node <= 2; node++ {
		p.kubectl("-n", p.namespace, "delete", "pod", actor("thief", node))
		thief(actor("thief", node), node, nil)
		_, err := p.kube.CoreV1().Services(p.namespace).Create(p.ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: actor("thief", node)},
			Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": actor("thief", node)}, ExternalIPs: []string{control.NodeIP(node).String()},
				Ports: []corev1.ServicePort{{Port: ports[node], TargetPort: intstr.FromInt32(8080)}},
			},
		}, metav1.CreateOptions{})
		p.must(err)
	}
	for node := 1; node <= 2; node++ {
		takes("external IP", node)
	}
	p.unharmed()
	p.figures("direct, by Services and as host ports and external IPs: nothing")
}

// port is the one of the two pod-facing ports at which a node's daemon listens.
func (p *play) port(node int) int32 {
	p.Helper()
	rules := p.onNode(node, "iptables", "-t", "nat", "-S", "IMDSGATE")
	_, to, _ := strings.Cut(rules, fmt.Sprintf("--to-destination %s:", control.NodeIP(node)))
	port, err := strconv.ParseInt(strings.TrimSpace(to), 10, 32)
	p.must(err)
	return int32(port)
}

// unconnected reports whether the attacker ended with this because nobody accepted its connection.
func unconnected(err error) bool {
	return err != nil && strings.Contains(err.Error(), "attacker: dial tcp")
}

// until waits for what only asking tells.
func (p *play) until(what string, is func() bool) {
	p.Helper()
	for !is() {
		select {
		case <-p.ctx.Done():
			p.Fatalf("%s: not in time", what)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// service makes one with an endpoint written by hand, and returns its IP.
func (p *play) service(name string, endpoint netip.Addr, ports map[string]int32) string {
	p.Helper()
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}}
	slice := endpoints(name, endpoint)
	for name, port := range ports {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: name, Port: port})
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	svc, err := p.kube.CoreV1().Services(p.namespace).Create(p.ctx, svc, metav1.CreateOptions{})
	p.must(err)
	_, err = p.kube.DiscoveryV1().EndpointSlices(p.namespace).Create(p.ctx, slice, metav1.CreateOptions{})
	p.must(err)
	return svc.Spec.ClusterIP
}

func endpoints(service string, endpoint netip.Addr) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{endpoint.String()}}},
	}
}

// refusesEndpoint fails unless the API server lets nobody write the endpoint's address into a Service.
func (p *play) refusesEndpoint() {
	p.Helper()
	if _, err := p.kube.DiscoveryV1().EndpointSlices(p.namespace).Create(p.ctx, endpoints("imds", imds.IPv4), metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		p.Errorf("the API server takes an endpoint %s: %v", imds.IPv4, err)
	}
	if _, err := p.kube.CoreV1().Services(p.namespace).Create(p.ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "imds"},
		Spec:       corev1.ServiceSpec{ExternalIPs: []string{imds.IPv4.String()}, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		p.Errorf("the API server takes an external IP %s: %v", imds.IPv4, err)
	}
}

// One pod floods the daemon of its node in one way after the other, then in all of them at once: another pod's answers are all there
// and its own, the container stays below the chart's memory limit, and afterwards mallory is served as well.
func TestScenarioHostileFloods(t *testing.T) {
	p := beginPlay(t, "hostile-floods", 4*time.Minute)
	const node, each = 1, 5 * time.Second
	p.memory(node, "echo 0 >memory.max_usage_in_bytes")
	floods := []string{"connections", "401 loop", "PUT flood", "huge heads", "slow heads"}
	var told []string
	flood := func(what string, kinds []string) {
		t.Helper()
		l := p.load(p.namespace, actor("victim", node), p.roles["victim"], 2, 20*time.Millisecond)
		came := make([]hostile.Flooded, len(kinds))
		var g errgroup.Group
		for i, kind := range kinds {
			g.Go(func() error { return p.attack(actor("mallory", node), &came[i], "flood", kind, each.String()) })
		}
		p.must(g.Wait())
		sum := l.end()
		for i, kind := range kinds {
			if came[i].Connections == 0 {
				t.Errorf("%s: nothing came of it", kind)
			}
		}
		for _, f := range sum.Failures[:min(5, len(sum.Failures))] {
			t.Errorf("%s: another pod: %s", what, f.Brief())
		}
		if sum.Sequences < 20 {
			t.Errorf("%s: another pod asked %d times", what, sum.Sequences)
		}
		told = append(told, fmt.Sprintf("%s %v: %d sequences p99 %s max %s", what, came, sum.Sequences, round(sum.P99), round(sum.Max)))
	}
	for _, kind := range floods {
		flood(kind, []string{kind})
	}
	flood("all", hostile.Floods())
	m := p.memory(node, "")
	limit := p.chartLimit()
	if m["limit"] != limit {
		t.Errorf("the container's limit is %d, the chart's %d", m["limit"], limit)
	}
	if m["max"] >= limit || m["failed"] != 0 || m["oom_kill"] != 0 {
		t.Errorf("the container's memory: %v", m)
	}
	p.unharmed()
	p.figures("at most %d of %d MiB; %s", m["max"]>>20, limit>>20, strings.Join(told, "; "))
}

// memory runs a command in the cgroup of the daemon's container and returns what is counted there.
func (p *play) memory(node int, command string) map[string]int64 {
	p.Helper()
	out := p.onNode(node, "sh", "-ec", fmt.Sprintf(`cd /sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' /proc/%d/cgroup)
		%s
		echo limit $(cat memory.limit_in_bytes); echo max $(cat memory.max_usage_in_bytes); echo failed $(cat memory.failcnt); cat memory.oom_control`, p.daemon(node), command))
	m := map[string]int64{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		n, err := strconv.ParseInt(f[1], 10, 64)
		p.must(err)
		m[f[0]] = n
	}
	return m
}

// chartLimit is the memory that the chart gives the daemon, in bytes.
func (p *play) chartLimit() int64 {
	p.Helper()
	d, err := p.kube.AppsV1().DaemonSets(namespace).Get(p.ctx, release, metav1.GetOptions{})
	p.must(err)
	return d.Spec.Template.Spec.Containers[0].Resources.Limits.Memory().Value()
}

// No daemon runs on the nodes, first with its redirect, then without it, as if somebody had flushed the rules: the endpoint is
// refused, to requests as to packets, and the next daemon serves.
func TestScenarioHostileWithoutDaemon(t *testing.T) {
	p := beginPlay(t, "hostile-alone", 3*time.Minute)
	for node := 1; node <= 2; node++ {
		p.routeIPv6(node)
	}
	p.upgrade(issuer, `nodeSelector={"kubernetes.io/os":"none"}`)
	p.gone()
	nothing := func(state string, requests int) {
		t.Helper()
		for node := 1; node <= 2; node++ {
			var o hostile.Outcome
			p.must(p.attack(actor("mallory", node), &o, "requests", nodeEndpoint, p.names(node), strconv.Itoa(requests)))
			refused := 0
			for _, n := range o.Unconnected {
				refused += n
			}
			if refused != requests {
				t.Errorf("node %d, %s: of %d requests %d had no connection: %+v", node, state, requests, refused, o)
			}
		}
		if sent := p.packets(); sent < 40_000 {
			t.Errorf("%s: only %d packets were sent", state, sent)
		}
		if found := p.reached(); len(found) > 0 {
			t.Errorf("%s: the endpoint was reached: %d times, such as %s", state, len(found), found[0])
		}
	}
	nothing("no daemon", 300)
	for node := 1; node <= 2; node++ {
		p.onNode(node, "iptables", "-t", "nat", "-D", "PREROUTING", "-m", "comment", "--comment", "imdsgate", "-j", "IMDSGATE")
	}
	nothing("neither daemon nor redirect", 6) // few refusals a second are told
	p.install(issuer)
	p.allServed()
	p.figures("on 2 nodes without a daemon, with its redirect and without: requests refused, no packet arrived")
}

// A probe with a host is asked by the node's kubelet, whose requests are the node's own. What comes of it is a bit, which IMDSv2 makes
// always the same: its author learns that the answer was 401.
func TestScenarioLimitKubeletProbe(t *testing.T) {
	s := beginScenario(t, 2*time.Minute)
	s.install()
	const ns, node = "hostile-probe", 1
	s.newNamespace(ns, nil)
	s.serviceAccount(ns, "mallory", "")
	before, err := s.fabric.Requests(s.ctx, 0)
	s.must(err)
	get := &corev1.HTTPGetAction{
		Host: imds.IPv4.String(), Port: intstr.FromInt32(80), Path: "/latest/meta-data/iam/security-credentials/" + nodeRole,
	}
	s.create(podSpec{namespace: ns, name: "mallory", account: "mallory", node: node, args: []string{"idle"}, edit: func(o *corev1.Pod) {
		o.Spec.Containers[0].ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: get}, PeriodSeconds: 1}
	}})
	for asked := false; !asked; {
		requests, err := s.fabric.Requests(s.ctx, len(before))
		s.must(err)
		for _, r := range requests {
			if !strings.HasPrefix(r.Header.Get("User-Agent"), "kube-probe/") {
				continue
			}
			if asked = true; r.Source != control.NodeIP(node) || r.Status != 401 {
				t.Errorf("the kubelet's probe is answered %s", r)
			}
		}
		select {
		case <-s.ctx.Done():
			t.Fatal("the kubelet does not ask the endpoint")
		case <-time.After(100 * time.Millisecond):
		}
	}
	told := ""
	for !strings.Contains(told, "statuscode: 401") {
		told = s.kubectl("-n", ns, "get", "events", "--field-selector=reason=Unhealthy", "-o", "jsonpath={.items[*].message}")
		select {
		case <-s.ctx.Done():
			t.Fatalf("the probe's author is told %q", told)
		case <-time.After(100 * time.Millisecond):
		}
	}
	if p := s.waitPod(ns, "mallory", running); p.Status.ContainerStatuses[0].Ready {
		t.Error("the pod is ready by the endpoint's answer")
	}
	s.kubectl("-n", ns, "delete", "pod", "mallory")
	s.breach()
	s.figures("the kubelet asks, as the node, and is answered 401")
}
