package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
	"github.com/imdsgate/imdsgate/proxy"
)

// Config is everything a person can set. parseConfig fills it: defaults, then the environment, then flags.
type Config struct {
	Node       string
	Kubeconfig string
	HostIPs    []netip.Addr
	Port       int

	OpsAddr     string
	DebugAddr   string
	Pprof       bool
	ProbeSocket string

	Policy              proxy.Policy // BaseRoleARN may be "auto" until run has asked the instance profile
	IntermediateRoleARN string
	STSRate             float64

	IMDSv1          bool
	Allow           []string
	IdentifyTimeout time.Duration
	CNIResults      string
	MetadataAddr    string

	Redirect      string
	Guard         bool
	GuardPriority int
	Interface     string
	StartupTaint  string
	StateDir      string

	LogLevel  slog.Level
	LogFormat string

	// What to do instead of serving.
	Cleanup, Check, All, GuardOnly, Probe, Version bool
	Args                                           []string

	InEffect []page.Flag // every setting, for people
}

// list is a comma-separated flag value that may also be given more than once.
type list struct {
	values *[]string
	set    bool
}

func (l *list) String() string {
	if l.values == nil {
		return ""
	}
	return strings.Join(*l.values, ",")
}

func (l *list) Set(s string) error {
	if !l.set { // the first value replaces the default, further ones add to it
		*l.values, l.set = nil, true
	}
	for v := range strings.SplitSeq(s, ",") {
		if v = strings.TrimSpace(v); v != "" {
			*l.values = append(*l.values, v)
		}
	}
	return nil
}

// flags declares every flag on c. Usage texts are what -help prints and what README's table is made of.
func (c *Config) flags(hostIPs *[]string) *flag.FlagSet {
	fs := flag.NewFlagSet("imdsgate", flag.ContinueOnError)
	p := &c.Policy
	p.Audiences = []string{"sts.amazonaws.com"}
	fs.StringVar(&c.Node, "node", "", "`name` of the node whose pods are served; $NODE_NAME if not set; required")
	fs.StringVar(&c.Kubeconfig, "kubeconfig", "", "`file`; empty: the pod's own service account")
	fs.Var(&list{values: hostIPs}, "host-ip", "node `address`(es) that the redirect sends to, IPv4 and/or IPv6, comma separated; $HOST_IP if not set; required")
	fs.IntVar(&c.Port, "port", 8254, "pod-facing `port`; the next one is used while another instance still holds it")
	fs.StringVar(&c.OpsAddr, "ops-addr", ":9181", "`address` of /metrics, /healthz and /readyz; empty: none")
	fs.StringVar(&c.DebugAddr, "debug-addr", "127.0.0.1:9182", "`address` of the status page and /debug/pods; empty: none")
	fs.BoolVar(&c.Pprof, "pprof", false, "serve /debug/pprof/ on -debug-addr")
	fs.StringVar(&c.ProbeSocket, "probe-socket", "/run/imdsgate-probe/probe.sock", "unix socket `file` that -probe asks; in a volume of the pod's own; empty: none")
	fs.StringVar(&p.Issuer, "issuer", proxy.IssuerAssumeRole, "assume-role (with the node's credentials) or web-identity (with the service account's token)")
	fs.StringVar(&p.BaseRoleARN, "base-role-arn", "", "`ARN` prefix that completes short role names, such as arn:aws:iam::123456789012:role/; auto: of the node's instance profile")
	fs.StringVar(&c.IntermediateRoleARN, "intermediate-role-arn", "", "role `ARN` assumed first, then used to assume the pods' roles")
	fs.StringVar(&p.ClusterName, "cluster-name", "", "`name` for the session tag eks-cluster-name")
	fs.DurationVar(&p.SessionDuration, "session-duration", time.Hour, "length of role sessions, 45m to 12h; at most 1h with -intermediate-role-arn")
	fs.BoolVar(&p.SessionTags, "session-tags", false, "tag assume-role sessions: eks-cluster-name, kubernetes-namespace, kubernetes-service-account")
	fs.Var(&list{values: &p.Audiences}, "audiences", "`audiences` that service accounts may name with web-identity, comma separated; the first is the default")
	fs.Float64Var(&c.STSRate, "sts-rate", 10, "STS issue `calls` a second, and the burst")
	fs.BoolVar(&p.PodAnnotations, "pod-annotations", false, "also accept kube2iam's and kiam's iam.amazonaws.com/role, /external-id and /session-name on pods")
	fs.StringVar(&p.NamespacePolicy, "namespace-policy", "auto", "off, glob (iam.amazonaws.com/allowed-roles), regexp (iam.amazonaws.com/permitted) or auto (whichever the namespace has)")
	fs.StringVar(&p.DefaultRole, "default-role", "", "`role` of a known pod that has none; exempt from the namespace policy; assume-role only")
	fs.BoolVar(&c.IMDSv1, "imdsv1", true, "answer requests without a session token; false: 401")
	fs.Var(&list{values: &c.Allow}, "allow", "further exact metadata `path` to pass through, repeatable; {mac} stands for one MAC address segment")
	fs.DurationVar(&c.IdentifyTimeout, "identify-timeout", 450*time.Millisecond, "longest hold of a request, identifying the pod and waiting for STS together")
	fs.StringVar(&c.CNIResults, "cni-results", "/var/lib/cni/results", "`directory` of the CNI results, by which a pod is known before the API server tells of its IP; may be absent; empty: the API server alone")
	fs.StringVar(&c.Redirect, "redirect", "iptables", "iptables, or none: the rules are somebody else's job")
	fs.BoolVar(&c.Guard, "guard", true, "keep the policy-routing rules that refuse pods the real endpoint")
	fs.IntVar(&c.GuardPriority, "guard-priority", 0, "`priority` of the guard's first rules")
	fs.StringVar(&c.Interface, "interface", "", "match the incoming interface too, such as eni+ or !eth0; empty: any")
	fs.StringVar(&c.StartupTaint, "startup-taint", "", "taint `key` removed from the node once pods would be answered; needs get and patch on nodes")
	fs.StringVar(&c.StateDir, "state-dir", "/run/imdsgate", "`directory` of the token key, the issued credentials and the rules' ownership, on a tmpfs; empty: keep nothing")
	fs.StringVar(&c.MetadataAddr, "metadata-addr", "169.254.169.254", "`address` of the real metadata endpoint, for passthrough")
	fs.TextVar(&c.LogLevel, "log-level", slog.LevelInfo, "debug, info, warn or error")
	fs.StringVar(&c.LogFormat, "log-format", "json", "json or text")
	fs.BoolVar(&c.Cleanup, "cleanup", false, "remove every rule of imdsgate, then exit: pods reach the node's own role again")
	fs.BoolVar(&c.Check, "check", false, "validate configuration, permissions and rules, print findings, exit 0 or 1; with NAMESPACE/POD behind all flags: explain that pod's answer")
	fs.BoolVar(&c.All, "all", false, "with -check: explain every pod of the node; without -node, what would become of every pod of the cluster")
	fs.BoolVar(&c.GuardOnly, "guard-only", false, "install the guard, then exit: the first step of a node or of a pod, before anything else")
	fs.BoolVar(&c.Probe, "probe", false, "ask the running instance whether it is ready (or, with health behind it, alive), exit 0 or 1")
	fs.BoolVar(&c.Version, "version", false, "print the version, then exit")
	return fs
}

// envName is the environment variable of a flag.
func envName(name string) string {
	return "IMDSGATE_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// oneShot names the flags that say what to do instead of serving: they have no environment variable, which would turn a
// whole DaemonSet into something else.
func oneShot(name string) bool {
	return slices.Contains([]string{"cleanup", "check", "all", "guard-only", "probe", "version"}, name)
}

// asksOneShot says whether the arguments ask for something that changes no rule, or removes them. The flag package stops at
// the first argument that is wrong, so the Config does not tell.
func asksOneShot(args []string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		return strings.HasPrefix(arg, "-") && oneShot(name) && name != "guard-only"
	})
}

// parseConfig reads flags and environment. It returns flag.ErrHelp after it has written the help to out.
func parseConfig(args []string, getenv func(string) string, out io.Writer) (*Config, error) {
	var (
		c       Config
		hostIPs []string
	)
	fs := c.flags(&hostIPs)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			writeHelp(out, fs)
			return nil, err
		}
		return &c, fmt.Errorf("%w (see imdsgate -help)", err)
	}
	c.Args = fs.Args()
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	fs.VisitAll(func(f *flag.Flag) {
		name := envName(f.Name)
		if v := getenv(name); v != "" && !given[f.Name] && !oneShot(f.Name) {
			if err := f.Value.Set(v); err != nil {
				errs = append(errs, fmt.Errorf("invalid value %q for %s: %w", v, name, err))
			}
			given[f.Name] = true
		}
	})
	if !given["node"] {
		c.Node = getenv("NODE_NAME")
	}
	if !given["host-ip"] {
		hostIPs = strings.FieldsFunc(getenv("HOST_IP"), func(r rune) bool { return r == ',' })
	}
	for _, s := range hostIPs {
		ip, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil {
			errs = append(errs, fmt.Errorf("-host-ip %q is not an IP address", s))
			continue
		}
		c.HostIPs = append(c.HostIPs, ip.Unmap())
	}
	c.InEffect = c.inEffect(fs)
	c.Policy.Node = c.Node
	c.Policy.Chained = c.IntermediateRoleARN != ""
	return &c, errors.Join(errs...)
}

// serving says whether the command is the daemon itself.
func (c *Config) serving() bool {
	return !c.Cleanup && !c.Check && !c.GuardOnly && !c.Probe && !c.Version
}

// Validate says everything that is wrong with the configuration at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	oneOf := func(name, v string, values ...string) {
		if !slices.Contains(values, v) {
			fail("-%s is %q: use one of %s", name, v, strings.Join(values, ", "))
		}
	}
	if c.serving() && len(c.Args) > 0 {
		fail("unexpected argument %q: flags are written -name=value or -name value", c.Args[0])
	}
	if c.Node == "" && !c.surveys() {
		fail("no node name: set -node, or NODE_NAME from spec.nodeName of the DaemonSet's pods")
	}
	if len(c.HostIPs) == 0 && !c.surveys() {
		fail("no node address: set -host-ip, or HOST_IP from status.hostIP of the DaemonSet's pods")
	}
	for i, ip := range c.HostIPs {
		if ip.IsUnspecified() || ip.IsMulticast() {
			fail("-host-ip %s: name the node's own address; a wildcard would open the port to every network", ip)
		}
		if slices.ContainsFunc(c.HostIPs[:i], func(o netip.Addr) bool { return o.Is4() == ip.Is4() }) {
			fail("-host-ip %s: one IPv4 and one IPv6 address at most", ip)
		}
	}
	if c.Port < 1 || c.Port > 65534 {
		fail("-port %d: use 1 to 65534 (the next port is used while another instance is on the node)", c.Port)
	}
	for name, addr := range map[string]string{"ops-addr": c.OpsAddr, "debug-addr": c.DebugAddr} {
		if addr == "" {
			continue
		}
		_, port, err := net.SplitHostPort(addr)
		if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 0 || n > 65535 {
			fail("-%s %q: use host:port or :port", name, addr)
		} else if n == c.Port || n == c.Port+1 {
			fail("-%s %q: port %d is pod-facing (-port %d and the next)", name, addr, n, c.Port)
		}
	}
	oneOf("redirect", c.Redirect, "iptables", "none")
	oneOf("log-format", c.LogFormat, "json", "text")
	if c.GuardPriority < 0 || c.GuardPriority > 32765 {
		fail("-guard-priority %d: use 0 to 32765", c.GuardPriority)
	}
	if c.STSRate <= 0 || c.STSRate > 1000 {
		fail("-sts-rate %v: use more than 0, up to 1000 calls a second", c.STSRate)
	}
	if c.IdentifyTimeout <= 0 || c.IdentifyTimeout > 900*time.Millisecond {
		fail("-identify-timeout %s: use up to 900ms; SDKs give up after 1s, the Go SDK after 500ms", c.IdentifyTimeout)
	}
	if c.CNIResults != "" && !filepath.IsAbs(c.CNIResults) {
		fail("-cni-results %q: use an absolute path, or an empty one to do without", c.CNIResults)
	}
	if c.IntermediateRoleARN != "" {
		if _, err := proxy.ParseRoleARN(c.IntermediateRoleARN); err != nil {
			fail("-intermediate-role-arn: %w", err)
		}
		if c.Policy.Issuer == proxy.IssuerWebIdentity {
			fail("-intermediate-role-arn does nothing with -issuer web-identity: the service account's token assumes the role itself; leave it out")
		}
	}
	if err := proxy.ValidateAllow(c.Allow); err != nil {
		errs = append(errs, err)
	}
	policy := c.Policy
	if policy.BaseRoleARN == "auto" {
		policy.BaseRoleARN = ""
	}
	if c.surveys() {
		policy.Node = "node"
	}
	if err := policy.Validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// writeHelp prints every flag, its default and its environment variable.
func writeHelp(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprint(w, `imdsgate gives every pod of a node its own IAM role through the EC2 metadata endpoint.

usage: imdsgate [flags]                     serve this node's pods (the DaemonSet)
       imdsgate -check [NAMESPACE/POD]      find out what is wrong
       imdsgate -cleanup                    remove every rule from this node

Each flag can also be set by the environment variable in brackets; the flag wins.

`)
	fs.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		line := "  -" + f.Name
		if value != "" {
			line += " " + value
		}
		if !oneShot(f.Name) {
			line += "  [" + envName(f.Name) + "]"
		}
		if f.DefValue != "" && f.DefValue != "false" {
			usage += " (default " + f.DefValue + ")"
		}
		fmt.Fprintf(w, "%s\n    \t%s\n", line, usage)
	})
}
