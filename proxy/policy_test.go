package proxy

import (
	"encoding/json"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/imdsgate/imdsgate/cache"
)

const testARN = "arn:aws:iam::123456789012:role/team/my-role"

// testPolicy is what the flags' defaults make.
func testPolicy(change func(*Policy)) *Policy {
	p := &Policy{
		Issuer: IssuerAssumeRole, NamespacePolicy: NamespacePolicyAuto, SessionDuration: time.Hour,
		Node: "ip-10-0-0-1.eu-west-1.compute.internal", Audiences: []string{"sts.amazonaws.com"},
	}
	if change != nil {
		change(p)
	}
	return p
}

// testSubject is a pod whose namespace permits everything.
func testSubject(p *Policy, account, pod map[string]string) Subject {
	return Subject{
		Pod:                       Pod{UID: "1", Namespace: "shop", Name: "cart-7", ServiceAccount: "cart"},
		PodAnnotations:            pod,
		ServiceAccountAnnotations: account,
		Namespace:                 p.Compile(map[string]string{AnnotationAllowedRoles: `["arn:*"]`}),
	}
}

func withRole(annotations ...string) map[string]string {
	m := map[string]string{AnnotationRoleARN: testARN}
	for i := 0; i < len(annotations); i += 2 {
		m[annotations[i]] = annotations[i+1]
	}
	return m
}

func TestAuthorizeGrants(t *testing.T) {
	key := cache.Key{
		RoleARN: testARN, SessionName: "shop.cart@ip-10-0-0-1", Namespace: "shop", ServiceAccount: "cart", Duration: time.Hour,
	}
	webIdentity := func(p *Policy) { p.Issuer = IssuerWebIdentity; p.Audiences = []string{"sts.amazonaws.com", "minio"} }
	podAnnotations := func(p *Policy) {
		p.PodAnnotations = true
		p.BaseRoleARN = "arn:aws:iam::123456789012:role/"
	}
	for _, tt := range []struct {
		name         string
		policy       func(*Policy)
		account, pod map[string]string
		want         func(*Grant)
		conflict     []string // parts of its text
	}{
		{name: "service account", account: withRole()},
		{name: "pod annotations are not read unless asked", account: withRole(), pod: map[string]string{
			AnnotationPodRole: "other", AnnotationPodSessionName: "other", AnnotationPodExternalID: "other",
		}},
		{name: "no path", account: withRole(AnnotationRoleARN, "arn:aws:iam::123456789012:role/r"), want: func(g *Grant) {
			g.Key.RoleARN, g.Role, g.Path = "arn:aws:iam::123456789012:role/r", "r", "r"
		}},
		{name: "MinIO", account: withRole(AnnotationRoleARN, "arn:minio:iam:us-east-1::role/idmp-x_Y="), want: func(g *Grant) {
			g.Key.RoleARN, g.Role, g.Path = "arn:minio:iam:us-east-1::role/idmp-x_Y=", "idmp-x_Y=", "idmp-x_Y="
		}},
		{name: "short name", policy: podAnnotations, account: withRole(AnnotationRoleARN, "/team/my-role")},
		{name: "EKS's annotations without effect", account: withRole(AnnotationSTSRegional, "no", AnnotationTokenExpiration, "x", AnnotationAudience, "y")},
		{name: "session duration", account: withRole(AnnotationSessionDuration, "2h30m0.5s"), want: func(g *Grant) {
			g.Key.Duration = 150 * time.Minute
		}},
		{name: "chained", policy: func(p *Policy) { p.Chained = true }, account: withRole(AnnotationSessionDuration, "1h")},
		{name: "external ID", account: withRole(AnnotationExternalID, "x/Y:1@z"), want: func(g *Grant) { g.Key.ExternalID = "x/Y:1@z" }},
		{name: "session tags", policy: func(p *Policy) { p.SessionTags, p.ClusterName = true, "c1" }, account: withRole(), want: func(g *Grant) {
			g.Key.Tags = cache.Tags{ClusterName: "c1", Namespace: "shop", ServiceAccount: "cart"}
		}},
		{name: "web identity", policy: webIdentity, account: withRole(), want: func(g *Grant) { g.Key.Audience = "sts.amazonaws.com" }},
		{name: "audience", policy: webIdentity, account: withRole(AnnotationAudience, "minio"), want: func(g *Grant) { g.Key.Audience = "minio" }},
		{name: "default role", policy: func(p *Policy) { p.DefaultRole = testARN; p.NamespacePolicy = "glob" }},
		{name: "short default role", policy: func(p *Policy) { podAnnotations(p); p.DefaultRole = "team/my-role" }},
		{name: "empty annotation is none", policy: func(p *Policy) { p.DefaultRole = testARN }, account: map[string]string{AnnotationRoleARN: ""}},

		{name: "pod's role", policy: podAnnotations, pod: map[string]string{AnnotationPodRole: "team/my-role"}},
		{name: "pod's role as ARN", policy: podAnnotations, pod: map[string]string{AnnotationPodRole: testARN}},
		{name: "pod's role before the default", policy: func(p *Policy) { podAnnotations(p); p.DefaultRole = "default" }, pod: map[string]string{AnnotationPodRole: testARN}},
		{name: "both, spelled differently", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodRole: "/team/my-role"}},
		{name: "both, different", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodRole: "other"},
			conflict: []string{"pod shop/cart-7", `"other"`, "service account shop/cart", testARN[:40]}},
		{name: "both, the pod's unusable", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodRole: "arn:oops"},
			conflict: []string{`"arn:oops"`}},
		{name: "pod's external ID", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodExternalID: "mine"}, want: func(g *Grant) { g.Key.ExternalID = "mine" }},
		{name: "external IDs differ", policy: podAnnotations, account: withRole(AnnotationExternalID, "operators"), pod: map[string]string{AnnotationPodExternalID: "mine"},
			want: func(g *Grant) { g.Key.ExternalID = "operators" }, conflict: []string{"external ID", AnnotationPodExternalID}},
		{name: "pod's session name", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodSessionName: "shop/bill run@ip-10-0-0-1"},
			want: func(g *Grant) { g.Key.SessionName = "shop-bill-runip-10-0-0-1" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := testPolicy(tt.policy)
			if err := p.Validate(); err != nil {
				t.Error(err)
			}
			want := &Grant{Key: key, Role: "my-role", Path: "team/my-role"}
			if tt.want != nil {
				tt.want(want)
			}
			got, refusal, conflict := p.Authorize(testSubject(p, tt.account, tt.pod))
			if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Grant{})); diff != "" || refusal != nil {
				t.Errorf("refusal %v, grant (-want +got):\n%s", refusal, diff)
			}
			if (conflict == "") != (tt.conflict == nil) {
				t.Errorf("conflict %q", conflict)
			}
			for _, part := range tt.conflict {
				if !strings.Contains(conflict, part) {
					t.Errorf("conflict %q, want %q in it", conflict, part)
				}
			}
		})
	}
}

func TestAuthorizeRefuses(t *testing.T) {
	webIdentity := func(p *Policy) { p.Issuer = IssuerWebIdentity }
	podAnnotations := func(p *Policy) { p.PodAnnotations = true }
	for _, tt := range []struct {
		name         string
		policy       func(*Policy)
		subject      func(*Subject)
		account, pod map[string]string
		want         Refusal  // its text, or else:
		parts        []string // of its text
	}{
		{name: "no role", want: Refusal{Kind: NoRole, Event: EventNoRole, Text: "service account shop/cart has no eks.amazonaws.com/role-arn annotation"}},
		{name: "no role, pod annotations ignored", pod: map[string]string{AnnotationPodRole: testARN},
			want: Refusal{Kind: NoRole, Event: EventNoRole, Text: "service account shop/cart has no eks.amazonaws.com/role-arn annotation" +
				"; annotation iam.amazonaws.com/role of pod shop/cart-7 counts with -pod-annotations alone"}},
		{name: "no role anywhere", policy: podAnnotations, want: Refusal{Kind: NoRole, Event: EventNoRole,
			Text: "service account shop/cart has no eks.amazonaws.com/role-arn annotation, and pod shop/cart-7 has no iam.amazonaws.com/role annotation (a Deployment's own is not its pods': theirs stand in its spec.template)"}},
		{name: "no service account", subject: func(s *Subject) { s.ServiceAccountAbsent = true }, want: Refusal{Kind: NoRole, Event: EventNoRole,
			Text: "service account shop/cart does not exist, so it has no eks.amazonaws.com/role-arn annotation"}},
		{name: "mirror pod", policy: func(p *Policy) { p.PodAnnotations, p.DefaultRole = true, testARN }, subject: func(s *Subject) { s.Pod.ServiceAccount = "" },
			pod: map[string]string{AnnotationPodRole: testARN}, want: Refusal{Kind: NoRole, Text: "pod shop/cart-7 has no service account, so it has no role"}},
		{name: "default role is not for web identity", policy: func(p *Policy) { webIdentity(p); p.DefaultRole = testARN },
			want: Refusal{Kind: NoRole, Event: EventNoRole, Text: "service account shop/cart has no eks.amazonaws.com/role-arn annotation"}},
		{name: "bad ARN", account: withRole(AnnotationRoleARN, "arn:oops"), want: Refusal{Kind: Invalid, Event: EventInvalidRoleARN, OnServiceAccount: true},
			parts: []string{AnnotationRoleARN, "service account shop/cart", `"arn:oops"`, roleARNForm}},
		{name: "bad ARN of the pod", policy: podAnnotations, pod: map[string]string{AnnotationPodRole: "arn:\x00\n" + strings.Repeat("x", 64<<10)},
			want: Refusal{Kind: Invalid, Event: EventInvalidRoleARN}, parts: []string{AnnotationPodRole, "pod shop/cart-7", `"arn:\x00\nxxx`}},
		{name: "bad ARN beside a default", policy: func(p *Policy) { p.DefaultRole = testARN }, account: withRole(AnnotationRoleARN, "arn:oops"),
			want: Refusal{Kind: Invalid, Event: EventInvalidRoleARN, OnServiceAccount: true}, parts: []string{`"arn:oops"`}},
		{name: "short name", account: withRole(AnnotationRoleARN, "my-role"), want: Refusal{Kind: Invalid, Event: EventInvalidRoleARN, OnServiceAccount: true},
			parts: []string{`"my-role"`, "-base-role-arn"}},
		{name: "namespace not known", account: withRole(), subject: func(s *Subject) { s.Namespace = nil }, want: Refusal{Kind: Denied, Event: EventRoleDenied},
			parts: []string{"namespace shop"}},
		{name: "long role", account: withRole(AnnotationRoleARN, "arn:minio:iam:::role/"+strings.Repeat("x/", 1000)+"r"), subject: func(s *Subject) { s.Namespace = &NamespaceRules{hasGlobs: true} },
			want: Refusal{Kind: Denied, Event: EventRoleDenied}, parts: []string{"does not permit role arn:minio", "…; fix: let annotation"}},
		{name: "role too long for a command", account: withRole(AnnotationRoleARN, "arn:minio:iam:::role/"+strings.Repeat("x/", 500)+"r"), subject: func(s *Subject) { s.Namespace = &NamespaceRules{} },
			want: Refusal{Kind: Denied, Event: EventRoleDenied}, parts: []string{"does not permit role arn:minio", "…; fix: let annotation"}},
		{name: "duration", account: withRole(AnnotationSessionDuration, "an hour"), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true},
			parts: []string{AnnotationSessionDuration, `"an hour"`, "90m"}},
		{name: "short duration", account: withRole(AnnotationSessionDuration, "44m59s"), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"45m to 12h"}},
		{name: "negative duration", account: withRole(AnnotationSessionDuration, "-1h"), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"45m to 12h"}},
		{name: "long duration", account: withRole(AnnotationSessionDuration, "12h1s"), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"45m to 12h"}},
		{name: "long chained duration", policy: func(p *Policy) { p.Chained = true }, account: withRole(AnnotationSessionDuration, "61m"),
			want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"-intermediate-role-arn", "1h"}},
		{name: "short external ID", account: withRole(AnnotationExternalID, "x"), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{AnnotationExternalID, "2 to 1224"}},
		{name: "long external ID", account: withRole(AnnotationExternalID, strings.Repeat("x", 1225)), want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"2 to 1224"}},
		{name: "pod's external ID", policy: podAnnotations, account: withRole(), pod: map[string]string{AnnotationPodExternalID: "a b"},
			want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation}, parts: []string{AnnotationPodExternalID, "pod shop/cart-7"}},
		{name: "external ID with web identity", policy: webIdentity, account: withRole(AnnotationExternalID, "xx"),
			want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{"AssumeRoleWithWebIdentity takes no external ID"}},
		{name: "audience", policy: webIdentity, account: withRole(AnnotationAudience, "vault"),
			want: Refusal{Kind: Invalid, Event: EventInvalidAnnotation, OnServiceAccount: true}, parts: []string{AnnotationAudience, `"vault"`, "-audiences", "sts.amazonaws.com"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := testPolicy(tt.policy)
			s := testSubject(p, tt.account, tt.pod)
			if tt.subject != nil {
				tt.subject(&s)
			}
			grant, got, conflict := p.Authorize(s)
			if grant != nil || got == nil || conflict != "" {
				t.Fatalf("granted %+v, conflict %q", grant, conflict)
			}
			checkText(t, got.Error())
			for _, part := range tt.parts {
				if !strings.Contains(got.Error(), part) {
					t.Errorf("text %q, want %q in it", got, part)
				}
			}
			if tt.parts != nil {
				tt.want.Text = got.Text
			}
			tt.want.Fix, tt.want.Misplaced = got.Fix, got.Misplaced // see TestFixes
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("refusal (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNamespacePolicy(t *testing.T) {
	const (
		role  = "arn:aws:iam::111111111111:role/"
		other = "arn:aws:iam::222222222222:role/"
	)
	allowed := func(list string) map[string]string { return map[string]string{AnnotationAllowedRoles: list} }
	permitted := func(expr string) map[string]string { return map[string]string{AnnotationPermitted: expr} }
	both := func(list, expr string) map[string]string {
		return map[string]string{AnnotationAllowedRoles: list, AnnotationPermitted: expr}
	}
	all := []string{NamespacePolicyGlob, NamespacePolicyRegexp, NamespacePolicyAuto}
	globs, regexps := []string{NamespacePolicyGlob, NamespacePolicyAuto}, []string{NamespacePolicyRegexp, NamespacePolicyAuto}
	for _, tt := range []struct {
		name        string
		modes       []string
		issuer      string // default: assume-role
		noBase      bool
		annotations map[string]string
		yes, no     []string
		text        []string // parts of the refusal of each of no
	}{
		{name: "off", modes: []string{NamespacePolicyOff}, annotations: both(`[]`, `(`), yes: []string{role + "r", other + "r"}},
		{name: "neither", modes: []string{NamespacePolicyGlob, NamespacePolicyAuto}, no: []string{role + "team/r"},
			text: []string{`kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["` + role + `team/r"]'`}},
		{name: "neither, regexp", modes: []string{NamespacePolicyRegexp}, no: []string{role + "team/r.x"},
			text: []string{`kubectl annotate namespace shop iam.amazonaws.com/permitted='arn:aws:iam::111111111111:role/team/r\.x'`}},
		{name: "neither, web identity", modes: all, issuer: IssuerWebIdentity, yes: []string{role + "r", other + "r"}},
		{name: "web identity", modes: globs, issuer: IssuerWebIdentity, annotations: allowed(`["r"]`), yes: []string{role + "r"}, no: []string{role + "q"}},

		// kube2iam's globs (peers-classic.md §3.2)
		{name: "name", modes: globs, annotations: allowed(`["my-role"]`), yes: []string{role + "my-role"},
			no: []string{role + "my-role-admin", role + "x/my-role", other + "my-role", role + "my-rol"}, text: []string{"no pattern of its iam.amazonaws.com/allowed-roles annotation matches"}},
		{name: "path", modes: globs, annotations: allowed(`["team/*"]`), yes: []string{role + "team/r", role + "team/sub/deep/r"}, no: []string{role + "r", role + "xteam/r", other + "team/r"}},
		{name: "leading slash", modes: globs, annotations: allowed(`["/team/*"]`), yes: []string{role + "team/r"}, no: []string{role + "r"}},
		{name: "any of the base account", modes: globs, annotations: allowed(`["*"]`), yes: []string{role + "r", role + "team/r"}, no: []string{other + "r"}},
		{name: "one character", modes: globs, annotations: allowed(`["r?"]`), yes: []string{role + "r1"}, no: []string{role + "r", role + "r12"}},
		{name: "cross-account", modes: globs, annotations: allowed(`["arn:aws:iam::*:role/r"]`), yes: []string{role + "r", other + "r"}, no: []string{role + "r2", role + "team/q"}},
		{name: "several", modes: globs, annotations: allowed(`["a", "b"]`), yes: []string{role + "a", role + "b"}, no: []string{role + "c"}},
		{name: "dot is a dot", modes: globs, annotations: allowed(`["r.x"]`), yes: []string{role + "r.x"}, no: []string{role + "rax"}},
		{name: "empty list", modes: globs, annotations: allowed(`[]`), no: []string{role + "r"}, text: []string{"does not permit role " + role + "r"}},
		{name: "null", modes: globs, annotations: allowed(`null`), no: []string{role + "r"}},
		{name: "empty pattern", modes: globs, annotations: allowed(`[""]`), no: []string{role + "r"}},
		{name: "no base", modes: globs, noBase: true, annotations: allowed(`["team/*"]`), no: []string{role + "team/r"}, text: []string{"-base-role-arn", `"team/*"`, "fix: run imdsgate with -base-role-arn"}},
		{name: "any of every account", modes: globs, noBase: true, annotations: allowed(`["*"]`), yes: []string{role + "r", other + "team/r"}},
		{name: "an end without a base", modes: globs, noBase: true, annotations: allowed(`["*/team/r"]`), yes: []string{role + "team/r"}, no: []string{role + "r"}},
		{name: "no base, ARNs", modes: globs, noBase: true, annotations: allowed(`["arn:aws:iam::111111111111:role/*"]`), yes: []string{role + "r"}, no: []string{other + "r"}},

		// kiam's regular expressions
		{name: "regexp", modes: regexps, annotations: permitted(role + "app-[ab]"), yes: []string{role + "app-a", role + "app-b"},
			no: []string{role + "app-a-admin", role + "app-c", "x" + role + "app-a"}, text: []string{"its iam.amazonaws.com/permitted annotation", "whole ARN"}},
		{name: "alternation does not escape the anchors", modes: regexps, annotations: permitted(role + "app-a|" + role + "app-b"),
			yes: []string{role + "app-a", role + "app-b"}, no: []string{role + "app-a-admin", "x" + role + "app-b"}},
		{name: "nor does a parenthesis", modes: regexps, annotations: permitted("a)|(?:.*"), no: []string{role + "r"}, text: []string{"cannot be read", "regular expression"}},
		{name: "nor an open quotation", modes: regexps, annotations: permitted(`.*|\Qa`), no: []string{role + "r"}},
		{name: "nor a flag", modes: regexps, annotations: permitted("(?m)arn:x$"), no: []string{role + "r"}},
		{name: "own anchors", modes: regexps, annotations: permitted("^" + role + "r$"), yes: []string{role + "r"}, no: []string{role + "rr"}},
		{name: "full ARN", modes: regexps, annotations: permitted("reporting.*"), no: []string{role + "reporting-db"}},
		{name: "within", modes: regexps, annotations: permitted(".*reporting.*"), yes: []string{role + "reporting-db", other + "x/reporting-db"}, no: []string{role + "r"}},
		{name: "empty expression", modes: regexps, annotations: permitted(""), no: []string{role + "r"}, text: []string{"iam.amazonaws.com/permitted='arn:aws:iam::111111111111:role/r' --overwrite"}},
		{name: "glob's list with regexp", modes: []string{NamespacePolicyRegexp}, annotations: allowed(`["*"]`), no: []string{role + "r"},
			text: []string{"it has no iam.amazonaws.com/permitted annotation, and iam.amazonaws.com/allowed-roles, which it has, is not read with -namespace-policy regexp"}},
		{name: "regexp's expression with glob", modes: []string{NamespacePolicyGlob}, annotations: permitted(".*"), no: []string{role + "r"},
			text: []string{"it has no iam.amazonaws.com/allowed-roles annotation, and iam.amazonaws.com/permitted, which it has, is not read with -namespace-policy glob"}},

		{name: "glob reads its own only", modes: []string{NamespacePolicyGlob}, annotations: both(`["a"]`, ".*"), yes: []string{role + "a"}, no: []string{role + "b"}},
		{name: "regexp reads its own only", modes: []string{NamespacePolicyRegexp}, annotations: both(`["a"]`, ".*"), yes: []string{role + "b"}},
		{name: "both must permit", modes: []string{NamespacePolicyAuto}, annotations: both(`["a","b"]`, ".*/(b|c)"), yes: []string{role + "b"}, no: []string{role + "a", role + "c", role + "d"}},
		{name: "one of both unreadable", modes: []string{NamespacePolicyAuto}, annotations: both(`["a"]`, "("), no: []string{role + "a"}, text: []string{"cannot be read", AnnotationPermitted}},
		{name: "the other one unreadable", modes: []string{NamespacePolicyAuto}, annotations: both(`a`, ".*"), no: []string{role + "a"}, text: []string{"cannot be read", AnnotationAllowedRoles}},

		{name: "no JSON", modes: globs, annotations: allowed("my-role\x00\n"), no: []string{role + "my-role"}, text: []string{"cannot be read", AnnotationAllowedRoles, `my-role\x00\n`, `["` + roleARNForm + `"]`}},
		{name: "no list", modes: globs, annotations: allowed(`"*"`), no: []string{role + "r"}, text: []string{"cannot be read"}},
		{name: "no strings", modes: globs, annotations: allowed(`["*", 1]`), no: []string{role + "r"}, text: []string{"cannot be read"}},
		{name: "cut JSON", modes: globs, annotations: allowed(`["*"`), no: []string{role + "r"}, text: []string{"cannot be read"}},
		{name: "two lists", modes: globs, annotations: allowed(`["a"]["*"]`), no: []string{role + "a", role + "r"}, text: []string{"cannot be read"}},
		{name: "many patterns", modes: globs, annotations: allowed(`["` + strings.Repeat(`*","`, 500) + `*"]`), no: []string{role + "r"}, text: []string{"more than 500", "fix: shorten the list"}},
		{name: "500 patterns", modes: globs, annotations: allowed(`["` + strings.Repeat(`x","`, 499) + `r"]`), yes: []string{role + "r"}},
		{name: "long list", modes: globs, annotations: allowed(`["*", "` + strings.Repeat("x", 32<<10) + `"]`), no: []string{role + "r"}, text: []string{"more than 32768 bytes"}},
		{name: "bad expression", modes: regexps, annotations: permitted("*\x07" + strings.Repeat("x", 4000)), no: []string{role + "r"}, text: []string{"cannot be read", `"*\axxx`}},
		{name: "long expression", modes: regexps, annotations: permitted(".*|" + strings.Repeat("x", 8<<10)), no: []string{role + "r"}, text: []string{"more than 8192 bytes"}},
		{name: "large expression", modes: regexps, annotations: permitted(".*|" + strings.Repeat("x{1000}", 30)), no: []string{role + "r"}, text: []string{"repeats too much"}},
		{name: "nested repetition", modes: regexps, annotations: permitted("(.*)*|((a{30}){30}){30}"), no: []string{role + "r"}},
		{name: "expression that would blow up a backtracker", modes: regexps, annotations: permitted("(a*)*(a|aa)+b|(.*)*"), yes: []string{role + "r", role + strings.Repeat("a", 60)}},
	} {
		for _, mode := range tt.modes {
			t.Run(tt.name+"/"+mode, func(t *testing.T) {
				p := testPolicy(func(p *Policy) {
					p.NamespacePolicy, p.BaseRoleARN = mode, role
					if tt.issuer != "" {
						p.Issuer = tt.issuer
					}
					if tt.noBase {
						p.BaseRoleARN = ""
					}
				})
				for _, arn := range slices.Concat(tt.yes, tt.no) {
					s := testSubject(p, withRole(AnnotationRoleARN, arn), nil)
					s.Namespace = p.Compile(tt.annotations)
					grant, refusal, _ := p.Authorize(s)
					if want := slices.Contains(tt.yes, arn); want != (grant != nil) || want != (refusal == nil) {
						t.Errorf("%s: permitted %v, want %v: %v", arn, grant != nil, want, refusal)
					} else if want || strings.HasPrefix(arn, "x") {
						continue
					}
					if refusal.Kind != Denied || refusal.Event != EventRoleDenied || refusal.OnServiceAccount {
						t.Errorf("refusal %+v", refusal)
					}
					checkText(t, refusal.Error())
					for _, part := range tt.text {
						if !strings.Contains(refusal.Error(), part) {
							t.Errorf("text %q, want %q in it", refusal, part)
						}
					}
				}
			})
		}
	}
}

// The command that a refusal advises does what it says when a person pastes it, and no more, whatever the author of the pod
// chose as the role and whatever the namespace permits already.
func TestAdviceCanBePasted(t *testing.T) {
	const before = "arn:aws:iam::123456789012:role/before"
	for _, tt := range []struct {
		mode   string
		now    map[string]string // the namespace's annotations
		append bool              // role before stays permitted
	}{
		{mode: NamespacePolicyGlob}, {mode: NamespacePolicyRegexp}, {mode: NamespacePolicyAuto},
		{mode: NamespacePolicyGlob, now: map[string]string{AnnotationAllowedRoles: `["` + before + `", "arn:aws:iam::1:role/x/*?"]`}, append: true},
		{mode: NamespacePolicyAuto, now: map[string]string{AnnotationPermitted: "(.*:role/before|x)"}, append: true},
		{mode: NamespacePolicyAuto, now: map[string]string{AnnotationAllowedRoles: before}},
		{mode: NamespacePolicyAuto, now: map[string]string{AnnotationPermitted: "("}},
	} {
		p := testPolicy(func(p *Policy) { p.NamespacePolicy = tt.mode })
		advice := func(role string) string {
			s := testSubject(p, withRole(AnnotationRoleARN, role), nil)
			s.Namespace = p.Compile(tt.now)
			_, refusal, _ := p.Authorize(s)
			return refusal.Fix
		}
		for _, role := range []string{testARN, "arn:minio:iam:us-east-1::role/a+b=c,d.e@f_g-h"} {
			command, pasted := strings.CutPrefix(advice(role), "kubectl ")
			out, err := exec.Command("sh", "-c", "printf '%s\\n' "+command).Output()
			if err != nil || !pasted {
				t.Fatal(command, err)
			}
			words := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
			if tt.now != nil && words[len(words)-1] == "--overwrite" {
				words = words[:len(words)-1]
			}
			if len(words) != 4 || strings.Join(words[:3], " ") != "annotate namespace shop" {
				t.Fatalf("the shell reads %q as %q", command, words)
			}
			name, value, _ := strings.Cut(words[3], "=")
			s := testSubject(p, withRole(AnnotationRoleARN, role), nil)
			s.Namespace = p.Compile(map[string]string{name: value})
			if _, refusal, _ := p.Authorize(s); refusal != nil {
				t.Errorf("after %q the refusal is: %v", command, refusal)
			}
			s.ServiceAccountAnnotations[AnnotationRoleARN] = role + "x"
			if grant, _, _ := p.Authorize(s); grant != nil {
				t.Errorf("after %q every role is permitted", command)
			}
			s.ServiceAccountAnnotations[AnnotationRoleARN] = before
			if grant, _, _ := p.Authorize(s); (grant != nil) != tt.append {
				t.Errorf("after %q role before is permitted: %v", command, grant != nil)
			}
		}
		for _, role := range []string{"arn:aws:iam::123456789012:role/';id;'/r", "arn:aws:iam::123456789012:role/*/r", "arn:aws:iam::123456789012:role/\"/r"} {
			if fix := advice(role); strings.Contains(fix, "kubectl") || !strings.Contains(fix, "of namespace shop permit the role") {
				t.Errorf("fix %q", fix)
			}
		}
	}
	// What stands there already is not pasted either, where it would leave its quotes.
	p := testPolicy(func(p *Policy) { p.NamespacePolicy = NamespacePolicyAuto })
	for _, now := range []map[string]string{
		{AnnotationPermitted: "x';id;'"}, {AnnotationAllowedRoles: `["arn:x';id;'"]`}, {AnnotationAllowedRoles: `["arn:x\\"]`}, {AnnotationPermitted: "x\n"},
	} {
		s := testSubject(p, withRole(), nil)
		s.Namespace = p.Compile(now)
		if _, refusal, _ := p.Authorize(s); strings.Contains(refusal.Fix, "kubectl") {
			t.Errorf("fix %q", refusal.Fix)
		}
	}
}

func TestSessionNames(t *testing.T) {
	name := func(namespace, account, node, annotated string) string {
		p := testPolicy(func(p *Policy) { p.Node, p.PodAnnotations = node, true })
		s := testSubject(p, withRole(), map[string]string{AnnotationPodSessionName: annotated})
		s.Pod.Namespace, s.Pod.ServiceAccount = namespace, account
		g, refusal, _ := p.Authorize(s)
		if refusal != nil {
			t.Fatal(refusal)
		}
		return g.Key.SessionName
	}
	long := strings.Repeat("x", 63)
	for _, tt := range []struct{ namespace, account, node, annotated, want string }{
		{"shop", "cart", "node-1", "", "shop.cart@node-1"},
		{"shop", "cart.v2", "node-1.example.org", "", "shop.cart.v2@node-1"},
		{"shop", "c art/\n", "nöde", "", "shop.c-art--@n-de"},
		{strings.Repeat("n", 29), strings.Repeat("a", 29), "node", "", strings.Repeat("n", 29) + "." + strings.Repeat("a", 29) + "@node"},
		{"shop", "cart", long, "", "shop.cart@" + long[:45] + "-########"},
		{long, "cart", "node", "", long[:55] + "@########"},
		{"shop", "cart", "node", "billing", "billing"},
		{"shop", "cart", "node", "shop.cart@node", "shop.cartnode"},
		{"shop", "cart", "node", "@", "-########"},
		{"shop", "cart", "node", "x", "x-########"},
		{"shop", "cart", "node", "ü\x00\xff x", "----x"},
		{"shop", "cart", "node", long + long, long[:55] + "-########"},
	} {
		got := name(tt.namespace, tt.account, tt.node, tt.annotated)
		want := regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(tt.want), "########", "[0-9a-f]{8}") + "$")
		if !want.MatchString(got) || !sessionNameForm.MatchString(got) {
			t.Errorf("%+v: %q, want %q", tt, got, tt.want)
		}
	}
	if a, b := name(long, long, "node", ""), name(long, long+"y", "node", ""); a == b {
		t.Errorf("two service accounts have the session name %q", a)
	}
	if a, b := name("shop", "cart", "node", long+"/x"), name("shop", "cart", "node", long+":x"); a == b {
		t.Errorf("two sessions have the name %q", a)
	}
	if n := name("shop", "cart", "node", name(long, long, "node", "")); strings.Contains(n, "@") || n == name(long, long, "node", "") {
		t.Errorf("a pod appears as another one: %q", n)
	}
}

var sessionNameForm = regexp.MustCompile(`^[A-Za-z0-9_+=,.@-]{2,64}$`) // STS's

func TestPolicyValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Policy)
		want   []string // in the error, one for each line of it
	}{
		{"defaults", nil, nil},
		{"web identity", func(p *Policy) { p.Issuer = IssuerWebIdentity }, nil},
		{"everything", func(p *Policy) {
			p.BaseRoleARN, p.DefaultRole = "arn:aws-cn:iam::123456789012:role/team/", "node-default"
			p.PodAnnotations, p.SessionTags, p.ClusterName, p.Chained = true, true, "c1", true
		}, nil},
		{"longest", func(p *Policy) { p.SessionDuration = 12 * time.Hour }, nil},
		{"shortest", func(p *Policy) { p.SessionDuration = 45 * time.Minute }, nil},
		{"zero", func(p *Policy) { *p = Policy{} }, []string{"-issuer", "-node", "-namespace-policy", "-session-duration"}},
		{"issuer", func(p *Policy) { p.Issuer = "irsa" }, []string{`-issuer "irsa"`}},
		{"base", func(p *Policy) { p.BaseRoleARN = "arn:aws:iam::1:role/" }, []string{"-base-role-arn"}},
		{"base with a name", func(p *Policy) { p.BaseRoleARN = "arn:aws:iam::123456789012:user/" }, []string{"-base-role-arn"}},
		{"base without an ARN", func(p *Policy) { p.BaseRoleARN = "auto" }, []string{"-base-role-arn"}},
		{"default role", func(p *Policy) { p.DefaultRole = "short" }, []string{"-default-role"}},
		{"default role with web identity", func(p *Policy) { p.Issuer, p.DefaultRole = IssuerWebIdentity, testARN }, []string{"-default-role"}},
		{"namespace policy", func(p *Policy) { p.NamespacePolicy = "none" }, []string{"-namespace-policy"}},
		{"duration", func(p *Policy) { p.SessionDuration = 44 * time.Minute }, []string{"-session-duration 44m0s"}},
		{"long duration", func(p *Policy) { p.SessionDuration = 13 * time.Hour }, []string{"-session-duration"}},
		{"chained duration", func(p *Policy) { p.Chained, p.SessionDuration = true, 2*time.Hour }, []string{"-intermediate-role-arn"}},
		{"web identity takes no tags and chains nothing", func(p *Policy) { p.Issuer, p.SessionTags, p.Chained = IssuerWebIdentity, true, true }, []string{"-session-tags", "-intermediate-role-arn"}},
		{"cluster name", func(p *Policy) { p.SessionTags, p.ClusterName = true, "prod, east" }, []string{"-cluster-name"}},
		{"long cluster name", func(p *Policy) { p.SessionTags, p.ClusterName = true, strings.Repeat("x", 257) }, []string{"-cluster-name"}},
		{"any cluster name without tags", func(p *Policy) { p.ClusterName = "prod, east" }, nil},
		{"audiences", func(p *Policy) { p.Issuer, p.Audiences = IssuerWebIdentity, nil }, []string{"-audiences"}},
		{"empty audience", func(p *Policy) { p.Audiences = []string{"a", ""} }, []string{"-audiences"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := testPolicy(tt.change).Validate()
			if (err == nil) != (tt.want == nil) {
				t.Fatalf("Validate: %v", err)
			}
			if err == nil {
				return
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(tt.want) {
				t.Fatalf("%d errors, want %d: %v", len(lines), len(tt.want), err)
			}
			for i, line := range lines {
				if !strings.Contains(line, tt.want[i]) {
					t.Errorf("error %q, want one about %s", line, tt.want[i])
				}
			}
		})
	}
}

func FuzzAuthorize(f *testing.F) {
	annotations := func(keysAndValues ...string) string {
		m := map[string]string{}
		for i := 0; i < len(keysAndValues); i += 2 {
			m[keysAndValues[i]] = keysAndValues[i+1]
		}
		data, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		return string(data)
	}
	f.Add("shop", "cart", annotations(AnnotationRoleARN, testARN), annotations(), annotations(AnnotationAllowedRoles, `["*"]`), uint8(0))
	f.Add("shop", "cart", annotations(AnnotationRoleARN, "arn:oops"), annotations(), annotations(), uint8(1))
	f.Add("shop", "", annotations(), annotations(AnnotationPodRole, "/a/b"), annotations(AnnotationPermitted, ".*"), uint8(15))
	f.Add("shop", "cart", annotations(AnnotationRoleARN, "x", AnnotationExternalID, "a b", AnnotationSessionDuration, "1e9h", AnnotationAudience, "\x00"), annotations(), annotations(AnnotationAllowedRoles, "["), uint8(7))
	f.Add("\n", strings.Repeat("x", 300), annotations(AnnotationRoleARN, strings.Repeat("\x00", 2000)),
		annotations(AnnotationPodSessionName, "@\xff", AnnotationPodExternalID, "''", AnnotationPodRole, "\u202e"), annotations(AnnotationPermitted, "(((a{9}){9}){9}"), uint8(255))
	externalID := regexp.MustCompile(`^([\w+=,.@:/-][\w+=,.@:/-]+)?$`)
	f.Fuzz(func(t *testing.T, namespace, account, onAccount, onPod, onNamespace string, flags uint8) {
		read := func(s string) (m map[string]string) {
			if json.Unmarshal([]byte(s), &m) != nil { // not JSON: the value of every annotation
				m = map[string]string{}
				for _, name := range []string{AnnotationRoleARN, AnnotationAudience, AnnotationSessionDuration, AnnotationExternalID, AnnotationPodRole,
					AnnotationPodExternalID, AnnotationPodSessionName, AnnotationAllowedRoles, AnnotationPermitted} {
					m[name] = s
				}
			}
			return m
		}
		p := testPolicy(func(p *Policy) {
			p.PodAnnotations, p.SessionTags, p.Chained = flags&1 > 0, flags&2 > 0, flags&4 > 0
			if flags&8 > 0 {
				p.BaseRoleARN = "arn:aws:iam::123456789012:role/"
			}
			if flags&16 > 0 {
				p.DefaultRole = testARN
			}
			p.NamespacePolicy = []string{"off", "glob", "regexp", "auto"}[flags>>5&3]
			if flags&128 > 0 {
				p.Issuer = IssuerWebIdentity
			}
		})
		s := Subject{
			Pod:                       Pod{Namespace: namespace, Name: "pod", ServiceAccount: account},
			ServiceAccountAnnotations: read(onAccount), PodAnnotations: read(onPod), Namespace: p.Compile(read(onNamespace)),
		}
		before := []map[string]string{maps.Clone(s.ServiceAccountAnnotations), maps.Clone(s.PodAnnotations)}
		grant, refusal, conflict := p.Authorize(s)
		if diff := cmp.Diff(before, []map[string]string{s.ServiceAccountAnnotations, s.PodAnnotations}); diff != "" {
			t.Errorf("the subject was changed:\n%s", diff)
		}
		if (grant == nil) == (refusal == nil) {
			t.Fatalf("grant %+v and refusal %+v", grant, refusal)
		}
		if conflict != "" {
			checkText(t, conflict)
		}
		if refusal != nil {
			checkText(t, refusal.Text)
			return
		}
		k := grant.Key
		role, err := ParseRoleARN(k.RoleARN)
		if err != nil || grant.Role != role.Name || grant.Path != role.PathName() {
			t.Errorf("role %+v: %v", grant, err)
		}
		longest := 12 * time.Hour
		if p.Chained {
			longest = time.Hour
		}
		webIdentity := p.Issuer == IssuerWebIdentity
		if k.Namespace != namespace || k.ServiceAccount != account || account == "" || !sessionNameForm.MatchString(k.SessionName) ||
			!externalID.MatchString(k.ExternalID) || len(k.ExternalID) > 1224 || k.Duration < 45*time.Minute || k.Duration > longest || k.Duration%time.Second != 0 ||
			webIdentity && (k.ExternalID != "" || k.Tags != cache.Tags{}) || webIdentity != slices.Contains(p.Audiences, k.Audience) {
			t.Errorf("key %+v", k)
		}
		again, _, _ := p.Authorize(s)
		if diff := cmp.Diff(grant, again, cmpopts.IgnoreUnexported(Grant{})); diff != "" {
			t.Errorf("the same subject got another grant:\n%s", diff)
		}
	})
}

func FuzzPattern(f *testing.F) {
	for _, seed := range [][2]string{{"", ""}, {"*", ""}, {"*", "a/b"}, {"a*b?c", "axxbyc"}, {"**a", "ba"}, {"?*", "x"}, {"a", "*"}, {"*a*a*a", "aaaab"}, {"arn:*:role/r", "arn:aws:iam::1:role/r"},
		{"a)|(?:b", "b"}, {"(?m)a$", "a\nb"}, {"a|b", "ab"}, {`a|\Qb`, "b"}, {"a|ab", "ab"}, {"(?U)a+", "aa"}} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, glob, s string) {
		if len(glob) > 64 || len(s) > 64 {
			return
		}
		if got, want := match(glob, s), matchSimply(glob, s); got != want {
			t.Errorf("match(%q, %q) = %v", glob, s, got)
		}
		// As an expression it permits what it matches from beginning to end, by itself and without our anchors.
		re, err := compileRegexp(glob)
		if err != nil {
			checkText(t, err.Error())
			return
		}
		alone := regexp.MustCompile(glob)
		alone.Longest()
		at := alone.FindStringIndex(s)
		if got, want := re.MatchString(s), slices.Equal(at, []int{0, len(s)}); got != want {
			t.Errorf("%s matches %q: %v, but alone it matches %v", re, s, got, at)
		}
	})
}

// matchSimply is match as its definition reads: row by row, ok[i] says that the glob so far matches s[:i].
func matchSimply(glob, s string) bool {
	ok := make([]bool, len(s)+1)
	ok[0] = true
	for g := range len(glob) {
		next := make([]bool, len(s)+1)
		for i := range next {
			switch glob[g] {
			case '*':
				next[i] = ok[i] || i > 0 && next[i-1]
			case '?':
				next[i] = i > 0 && ok[i-1]
			default:
				next[i] = i > 0 && ok[i-1] && s[i-1] == glob[g]
			}
		}
		ok = next
	}
	return ok[len(s)]
}

// What a namespace's annotation may cost at most, in one decision.
func BenchmarkWorstPatterns(b *testing.B) {
	role := "arn:aws:iam::123456789012:role/" + strings.Repeat("a", 1900) + "/r"
	for name, annotations := range map[string]map[string]string{
		"glob":   {AnnotationAllowedRoles: `["arn:x"` + strings.Repeat(`,"arn:*`+strings.Repeat("a", 950)+`b"`, 33) + `]`},
		"regexp": {AnnotationPermitted: strings.Repeat("(.?){900}", maxRegexpSize/4/900) + "b"},
	} {
		b.Run(name, func(b *testing.B) {
			p := testPolicy(nil)
			s := testSubject(p, withRole(AnnotationRoleARN, role), nil)
			s.Namespace = p.Compile(annotations)
			for b.Loop() {
				if _, refusal, _ := p.Authorize(s); refusal == nil || strings.Contains(refusal.Text, "cannot be read") {
					b.Fatal(refusal)
				}
			}
		})
	}
}
