package proxy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/imdsgate/imdsgate/cache"
)

// Issuers, the values of -issuer.
const (
	IssuerAssumeRole  = "assume-role"
	IssuerWebIdentity = "web-identity"
)

// Annotations that imdsgate reads: names of the contract, of EKS, kube2iam and kiam.
const (
	AnnotationRoleARN         = "eks.amazonaws.com/role-arn"               // ServiceAccount
	AnnotationAudience        = "eks.amazonaws.com/audience"               // ServiceAccount
	AnnotationTokenExpiration = "eks.amazonaws.com/token-expiration"       // ServiceAccount
	AnnotationSTSRegional     = "eks.amazonaws.com/sts-regional-endpoints" // ServiceAccount, no effect
	AnnotationSessionDuration = "imdsgate.dev/session-duration"            // ServiceAccount
	AnnotationExternalID      = "imdsgate.dev/external-id"                 // ServiceAccount
	AnnotationPodRole         = "iam.amazonaws.com/role"                   // Pod
	AnnotationPodExternalID   = "iam.amazonaws.com/external-id"            // Pod
	AnnotationPodSessionName  = "iam.amazonaws.com/session-name"           // Pod
	AnnotationAllowedRoles    = "iam.amazonaws.com/allowed-roles"          // Namespace, JSON list of globs
	AnnotationPermitted       = "iam.amazonaws.com/permitted"              // Namespace, regular expression
)

// Values of -namespace-policy.
const (
	NamespacePolicyOff    = "off"
	NamespacePolicyGlob   = "glob"
	NamespacePolicyRegexp = "regexp"
	NamespacePolicyAuto   = "auto"
)

// Bounds of a session's duration. Below the shortest, a refresh at half life could not keep 20 min in hand. The longest of a
// chained session is STS's.
const (
	MinSessionDuration        = 45 * time.Minute
	MaxSessionDuration        = 12 * time.Hour
	MaxChainedSessionDuration = time.Hour
)

// maxTagValue is STS's limit for the value of a session tag.
const maxTagValue = 256

// maxText bounds what a refusal says, in bytes.
const maxText = 1024

// Bounds of a namespace's patterns. Whoever can write the annotation must not be able to keep the node busy with it.
const (
	maxGlobs      = 500
	maxGlobsBytes = 32 << 10 // of the whole annotation
	maxRegexp     = 8 << 10  // bytes
	maxRegexpSize = 10000    // instructions, roughly: repetitions count as often as they may repeat
)

// Policy decides which role a pod may have: pure, total on any input, safe for concurrent use. Prefetch and requests use the
// same decision.
type Policy struct {
	Issuer          string // IssuerAssumeRole or IssuerWebIdentity
	BaseRoleARN     string // completes short role names; empty: they are refused
	DefaultRole     string // of a known pod with no role at all; exempt from the namespace policy
	NamespacePolicy string // off, glob, regexp, auto
	PodAnnotations  bool   // also read kube2iam's and kiam's annotations on pods
	SessionDuration time.Duration
	SessionTags     bool
	ClusterName     string
	Node            string   // in the session name, up to its first dot
	Audiences       []string // that a service account may name; the first is the default
	Chained         bool     // an intermediate role is assumed first: sessions are at most 1 h
}

// Subject is what the decision about a pod rests on. Annotation maps may be nil.
type Subject struct {
	Pod                       Pod
	PodAnnotations            map[string]string
	ServiceAccountAnnotations map[string]string
	ServiceAccountAbsent      bool // confirmed absent
	Namespace                 *NamespaceRules
}

// Validate says what is wrong with the flags that the policy is made of, all of it at once.
func (p *Policy) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	webIdentity := p.Issuer == IssuerWebIdentity
	if !webIdentity && p.Issuer != IssuerAssumeRole {
		fail("-issuer %s: must be %s or %s", quoted(p.Issuer), IssuerAssumeRole, IssuerWebIdentity)
	}
	if p.Node == "" {
		fail("-node is empty: give the name of this node, or set NODE_NAME from the pod's spec.nodeName")
	}
	if p.BaseRoleARN != "" {
		if _, err := parseRoleARN(complete(p.BaseRoleARN, "name")); err != nil {
			fail("-base-role-arn %s: must be a prefix such as arn:aws:iam::123456789012:role/: %w", quoted(p.BaseRoleARN), err)
		}
	}
	if p.DefaultRole != "" {
		if webIdentity {
			fail("-default-role cannot be used with -issuer %s: give service accounts a role each", IssuerWebIdentity)
		} else if _, err := completeRole(p.BaseRoleARN, p.DefaultRole); err != nil {
			fail("-default-role: %w", err)
		}
	}
	switch p.NamespacePolicy {
	case NamespacePolicyOff, NamespacePolicyGlob, NamespacePolicyRegexp, NamespacePolicyAuto:
	default:
		fail("-namespace-policy %s: must be off, glob, regexp or auto", quoted(p.NamespacePolicy))
	}
	if _, err := p.checkDuration(p.SessionDuration); err != nil {
		fail("-session-duration %s: %w", p.SessionDuration, err)
	}
	if p.SessionTags && webIdentity {
		fail("-session-tags cannot be used with -issuer %s: AssumeRoleWithWebIdentity takes no tags", IssuerWebIdentity)
	}
	if p.SessionTags && (len(p.ClusterName) > maxTagValue || !only(p.ClusterName, isTagByte)) {
		fail("-cluster-name %s: as a session tag it must be at most %d letters, digits and _.:/=+-@", quoted(p.ClusterName), maxTagValue)
	}
	if p.Chained && webIdentity {
		fail("-intermediate-role-arn cannot be used with -issuer %s: the token assumes the pod's role itself", IssuerWebIdentity)
	}
	if len(p.Audiences) == 0 && webIdentity {
		fail("-audiences is empty: name at least one, such as sts.amazonaws.com")
	}
	if slices.Contains(p.Audiences, "") {
		fail("-audiences holds an empty audience: remove the extra comma")
	}
	return errors.Join(errs...)
}

// Authorize decides. Exactly one of Grant and Refusal is not nil. Conflict is not empty when the pod's own annotation
// differs from the service account's, which wins.
//
// The role is that of the service account, else (PodAnnotations) that of the pod, else DefaultRole. The first two need the
// namespace's consent; the default was chosen by the operator.
func (p *Policy) Authorize(s Subject) (grant *Grant, refusal *Refusal, conflict string) {
	defer func() { // so that no text, whatever was annotated, leaves its bounds
		conflict = oneLine(conflict)
		if refusal != nil {
			refusal.bound()
		}
	}()
	if s.Pod.ServiceAccount == "" { // mirror pods
		return nil, &Refusal{
			Kind: NoRole, Text: fmt.Sprintf("pod %s/%s has no service account, so it has no role", s.Pod.Namespace, s.Pod.Name),
			Fix: "static pods cannot have a role: run it as a DaemonSet or Deployment with a service account",
		}, ""
	}
	annotations := p.read(s)
	role, refusal := p.role(s, annotations)
	if refusal != nil {
		return nil, refusal, p.conflict(annotations)
	}
	key, refusal := p.key(s, annotations)
	if refusal != nil {
		return nil, refusal, p.conflict(annotations)
	}
	key.RoleARN = role.String()
	return &Grant{Key: key, Role: role.Name, Path: role.PathName()}, nil, p.conflict(annotations)
}

// annotation is a value together with where it stands.
type annotation struct {
	name, value string
	on          string // for people: service account shop/cart
	onAccount   bool
}

// invalid refuses an annotation; fix is what to do.
func (a annotation) invalid(event, fix, format string, args ...any) *Refusal {
	return &Refusal{
		Kind: Invalid, Event: event, OnServiceAccount: a.onAccount, Fix: fix,
		Text: fmt.Sprintf("annotation %s of %s: %s", a.name, a.on, fmt.Sprintf(format, args...)),
	}
}

// annotated are the annotations that count. An empty value is none.
type annotated struct {
	role, podRole             annotation // role is the one that counts; podRole is the pod's
	externalID, podExternalID annotation
	duration, audience        annotation
	sessionName               annotation
}

func (p *Policy) read(s Subject) annotated {
	account := func(name string) annotation {
		return annotation{name, s.ServiceAccountAnnotations[name], "service account " + s.Pod.Namespace + "/" + s.Pod.ServiceAccount, true}
	}
	a := annotated{
		role:       account(AnnotationRoleARN),
		externalID: account(AnnotationExternalID),
		duration:   account(AnnotationSessionDuration),
		audience:   account(AnnotationAudience),
	}
	if !p.PodAnnotations {
		return a
	}
	pod := func(name string) annotation {
		return annotation{name, s.PodAnnotations[name], "pod " + s.Pod.Namespace + "/" + s.Pod.Name, false}
	}
	a.podRole, a.podExternalID, a.sessionName = pod(AnnotationPodRole), pod(AnnotationPodExternalID), pod(AnnotationPodSessionName)
	if a.role.value == "" && a.podRole.value != "" {
		a.role = a.podRole
	}
	if a.externalID.value == "" && a.podExternalID.value != "" {
		a.externalID = a.podExternalID
	}
	return a
}

// conflict says where the pod's annotations differ from those that count.
func (p *Policy) conflict(a annotated) string {
	var texts []string
	if a.podRole.value != "" && !p.sameRole(a.role.value, a.podRole.value) {
		texts = append(texts, fmt.Sprintf("%s names %s in %s, but %s names %s in %s, which is used: remove one of them", a.podRole.on, quoted(a.podRole.value), a.podRole.name,
			a.role.on, quoted(a.role.value), a.role.name))
	}
	if a.podExternalID.value != "" && a.externalID.value != a.podExternalID.value {
		texts = append(texts, fmt.Sprintf("the external ID in annotation %s of %s is not that in %s of %s, which is used: remove one of them", a.podExternalID.name, a.podExternalID.on,
			a.externalID.name, a.externalID.on))
	}
	return strings.Join(texts, "; ")
}

func (p *Policy) sameRole(a, b string) bool {
	x, errX := completeRole(p.BaseRoleARN, a)
	y, errY := completeRole(p.BaseRoleARN, b)
	return a == b || errX == nil && errY == nil && x == y
}

// role finds the pod's role and asks the namespace for its consent.
func (p *Policy) role(s Subject, a annotated) (RoleARN, *Refusal) {
	if a.role.value != "" {
		role, err := completeRole(p.BaseRoleARN, a.role.value)
		if err != nil {
			example := p.exampleRole()
			if meant, err := completeRole(p.BaseRoleARN, bare(a.role.value)); err == nil {
				example = meant.String()
			}
			return RoleARN{}, a.role.invalid(EventInvalidRoleARN, a.role.correct(s, example), "%v", err)
		}
		if text := p.deny(s, role.String()); text != "" {
			return RoleARN{}, &Refusal{Kind: Denied, Event: EventRoleDenied, Text: text, Fix: p.permit(s, role.String())}
		}
		return role, nil
	}
	if p.DefaultRole != "" && p.Issuer == IssuerAssumeRole {
		role, err := completeRole(p.BaseRoleARN, p.DefaultRole)
		if err != nil { // Validate has refused it
			return RoleARN{}, &Refusal{Kind: Invalid, Text: fmt.Sprintf("-default-role: %v", err)}
		}
		return role, nil
	}
	return RoleARN{}, p.noRole(s, a)
}

// key fills in everything but the role.
func (p *Policy) key(s Subject, a annotated) (cache.Key, *Refusal) {
	k := cache.Key{
		SessionName:    sessionName(s.Pod.Namespace+"."+s.Pod.ServiceAccount+"@"+firstLabel(p.Node), '@'),
		Namespace:      s.Pod.Namespace,
		ServiceAccount: s.Pod.ServiceAccount,
		Duration:       p.SessionDuration,
	}
	if a.sessionName.value != "" {
		// Ours hold an @, those that a pod chooses do not: no pod can appear as another one in CloudTrail.
		k.SessionName = sessionName(strings.ReplaceAll(a.sessionName.value, "@", ""), '-')
	}
	if a.duration.value != "" {
		d, err := time.ParseDuration(a.duration.value)
		if err != nil {
			return k, a.duration.invalid(EventInvalidAnnotation, a.duration.correct(s, "1h"), "%s is not a duration such as 1h or 90m", quoted(a.duration.value))
		}
		if k.Duration, err = p.checkDuration(d); err != nil {
			return k, a.duration.invalid(EventInvalidAnnotation, a.duration.correct(s, "1h"), "%s: %v", quoted(a.duration.value), err)
		}
	}
	if p.Issuer == IssuerWebIdentity {
		var refusal *Refusal
		k.Audience, refusal = p.audience(s, a)
		return k, refusal
	}
	if id := a.externalID; id.value != "" {
		if n := len(id.value); n < 2 || n > 1224 || !only(id.value, isExternalIDByte) {
			return k, id.invalid(EventInvalidAnnotation, "use the external ID that the role's trust policy asks for", "%s is not 2 to 1224 letters, digits and _+=,.@:/-", quoted(id.value))
		}
		k.ExternalID = id.value
	}
	if p.SessionTags {
		k.Tags = cache.Tags{ClusterName: p.ClusterName, Namespace: s.Pod.Namespace, ServiceAccount: s.Pod.ServiceAccount}
	}
	return k, nil
}

// audience of the web identity token. What AssumeRoleWithWebIdentity does not take is refused: to leave an external ID out
// would be to ignore what somebody relies on.
func (p *Policy) audience(s Subject, a annotated) (string, *Refusal) {
	if a.externalID.value != "" {
		return "", a.externalID.invalid(EventInvalidAnnotation, "remove the annotation and let the role's trust policy name the service account instead",
			"AssumeRoleWithWebIdentity takes no external ID")
	}
	audience := a.audience.value
	if audience == "" && len(p.Audiences) > 0 {
		audience = p.Audiences[0]
	}
	if !slices.Contains(p.Audiences, audience) {
		fix := "add it to -audiences"
		if len(p.Audiences) > 0 {
			fix += ", or " + a.audience.correct(s, p.Audiences[0])
		}
		return "", a.audience.invalid(EventInvalidAnnotation, fix, "%s is none of the audiences that imdsgate was given with -audiences: %s",
			quoted(audience), quoted(strings.Join(p.Audiences, ",")))
	}
	return audience, nil
}

// checkDuration returns the duration in whole seconds, as STS takes it.
func (p *Policy) checkDuration(d time.Duration) (time.Duration, error) {
	switch {
	case p.Chained && d > MaxChainedSessionDuration:
		return 0, errors.New("with -intermediate-role-arn sessions last at most 1h: STS limits role chaining")
	case d < MinSessionDuration || d > MaxSessionDuration:
		return 0, errors.New("sessions last from 45m to 12h")
	}
	return d.Truncate(time.Second), nil
}

// sessionName makes a name that STS takes: 2 to 64 of [\w+=,.@-]. What had to be cut ends with a hash of the whole, after an
// @ where the cut took it away and ours must hold one.
func sessionName(s string, mark byte) string {
	const shortest, longest, hashed = 2, 64, 8
	name := strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf || !isNameByte(byte(r)) {
			return '-'
		}
		return r
	}, s)
	if len(name) >= shortest && len(name) <= longest {
		return name
	}
	sum := sha256.Sum256([]byte(s))
	name = name[:min(len(name), longest-hashed-1)]
	if strings.IndexByte(name, mark) >= 0 {
		mark = '-'
	}
	return name + string(mark) + hex.EncodeToString(sum[:hashed/2])
}

func firstLabel(host string) string {
	label, _, _ := strings.Cut(host, ".")
	return label
}

// isExternalIDByte is [\w+=,.@:/-].
func isExternalIDByte(c byte) bool { return isNameByte(c) || c == ':' || c == '/' }

// isTagByte is of the value of a session tag. STS takes letters of any script and spaces too; names of clusters have none.
func isTagByte(c byte) bool { return isExternalIDByte(c) && c != ',' }

// oneLine bounds a text that is shown to pods and in Events: printable, at most maxText bytes.
func oneLine(s string) string { return oneLineOf(s, maxText) }

func oneLineOf(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) <= limit {
		return s
	}
	const cut = "…"
	return strings.ToValidUTF8(s[:limit-len(cut)], "") + cut
}

// NamespaceRules are a namespace's role patterns, compiled once when the object changes.
type NamespaceRules struct {
	hasGlobs, hasRegexp bool // the annotation is there and the policy reads it
	globs               []string
	pattern             *regexp.Regexp
	expression          string // that pattern is made of
	unreadable          error  // of one line; then nothing is permitted
	advice              string // what to do about it, where to write the annotation anew would lose what is right in it
	unread              string // an annotation that is there, but that -namespace-policy does not read
}

// Compile reads a namespace's annotations. What cannot be compiled becomes rules that permit nothing and say why. With both
// annotations and -namespace-policy auto both must permit a role: the stricter reading.
func (p *Policy) Compile(annotations map[string]string) *NamespaceRules {
	n := &NamespaceRules{}
	if other := map[string]string{NamespacePolicyGlob: AnnotationPermitted, NamespacePolicyRegexp: AnnotationAllowedRoles}[p.NamespacePolicy]; annotations[other] != "" {
		n.unread = other
	}
	if p.NamespacePolicy == NamespacePolicyGlob || p.NamespacePolicy == NamespacePolicyAuto {
		if list, ok := annotations[AnnotationAllowedRoles]; ok {
			n.hasGlobs = true
			var err error
			if n.globs, n.advice, err = p.compileGlobs(list); err != nil {
				n.unreadable = fmt.Errorf("annotation %s: %w", AnnotationAllowedRoles, err)
			}
		}
	}
	if p.NamespacePolicy == NamespacePolicyRegexp || p.NamespacePolicy == NamespacePolicyAuto {
		if expr, ok := annotations[AnnotationPermitted]; ok {
			n.hasRegexp, n.expression = true, expr
			var err error
			if n.pattern, err = compileRegexp(expr); err != nil && n.unreadable == nil {
				n.unreadable = fmt.Errorf("annotation %s: %w", AnnotationPermitted, err)
			}
		}
	}
	return n
}

// compileGlobs reads a list of patterns. Advice is what to do about an error of a list whose patterns may be meant as they are.
func (p *Policy) compileGlobs(list string) (globs []string, advice string, err error) {
	const (
		shorten  = "shorten the list: one pattern with * may stand for many"
		withBase = "run imdsgate with -base-role-arn, as kube2iam with --base-role-arn, or begin each pattern with arn:"
	)
	if len(list) > maxGlobsBytes {
		return nil, shorten, fmt.Errorf("it has more than %d bytes", maxGlobsBytes)
	}
	if err := json.Unmarshal([]byte(list), &globs); err != nil {
		return nil, "", fmt.Errorf("%s is no JSON list of strings such as [%q]: %w", quoted(list), roleARNForm, err)
	}
	if len(globs) > maxGlobs {
		return nil, shorten, fmt.Errorf("it has more than %d patterns", maxGlobs)
	}
	for i, glob := range globs {
		if p.BaseRoleARN == "" {
			if strings.HasPrefix(glob, "arn:") || strings.HasPrefix(glob, "*") {
				continue // as kube2iam without a base ARN: "*" is every role of every account
			}
			return nil, withBase, fmt.Errorf("pattern %s does not begin with arn:, and imdsgate runs without -base-role-arn, which would complete it", quoted(glob))
		}
		globs[i] = complete(p.BaseRoleARN, glob)
	}
	return globs, "", nil
}

func compileRegexp(expr string) (*regexp.Regexp, error) {
	if len(expr) > maxRegexp {
		return nil, fmt.Errorf("it has more than %d bytes", maxRegexp)
	}
	// Alone first: "a)|(?:b" would climb out of the group that anchors it.
	tree, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		return nil, fmt.Errorf("%s is no regular expression: %s", quoted(expr), errorCode(err))
	}
	if size(tree) > maxRegexpSize {
		return nil, fmt.Errorf("%s repeats too much", quoted(expr))
	}
	pattern, err := regexp.Compile("^(?:" + expr + ")$")
	if err != nil {
		return nil, fmt.Errorf("%s is no regular expression: %s", quoted(expr), errorCode(err))
	}
	return pattern, nil
}

// errorCode is what is wrong with a regular expression, without the expression.
func errorCode(err error) string {
	if e, ok := errors.AsType[*syntax.Error](err); ok {
		return string(e.Code)
	}
	return "it cannot be compiled"
}

// size is about the number of instructions that an expression compiles to. The parser bounds the depth.
func size(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n += size(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1)
	}
	return min(n, maxRegexpSize+1)
}

// deny is why the subject's namespace does not permit a role; empty: it does.
func (p *Policy) deny(s Subject, role string) string {
	n := s.Namespace
	switch {
	case p.NamespacePolicy == NamespacePolicyOff:
		return ""
	case n == nil:
		return fmt.Sprintf("what namespace %s permits is not known", s.Pod.Namespace)
	case n.unreadable != nil:
		return fmt.Sprintf("namespace %s permits no role, because it cannot be read which: %v", s.Pod.Namespace, n.unreadable)
	case !n.hasGlobs && !n.hasRegexp:
		if p.Issuer == IssuerWebIdentity {
			return "" // the role's trust policy names the service accounts that may have it
		}
		name := AnnotationAllowedRoles
		if p.NamespacePolicy == NamespacePolicyRegexp {
			name = AnnotationPermitted
		}
		text := fmt.Sprintf("namespace %s does not permit role %s: it permits none, it has no %s annotation", s.Pod.Namespace, role, name)
		if n.unread != "" {
			text += ", and " + n.unread + ", which it has, is not read with -namespace-policy " + p.NamespacePolicy
		}
		return text
	}
	var against []string
	if n.hasGlobs && !slices.ContainsFunc(n.globs, func(glob string) bool { return match(glob, role) }) {
		against = append(against, "no pattern of its "+AnnotationAllowedRoles+" annotation matches")
	}
	if n.hasRegexp && !n.pattern.MatchString(role) {
		against = append(against, "its "+AnnotationPermitted+" annotation, which must match the whole ARN, does not")
	}
	if against == nil {
		return ""
	}
	return fmt.Sprintf("namespace %s does not permit role %s: %s", s.Pod.Namespace, role, strings.Join(against, ", and "))
}

// match says whether a glob matches all of s: * is any run of bytes, / included, ? is one byte. It takes at most
// len(glob)·len(s) steps, because only the last * is ever tried again.
func match(glob, s string) bool {
	g, i := 0, 0
	star, from := -1, 0 // the last * and how much of s it does not take in
	for i < len(s) {
		switch {
		case g < len(glob) && glob[g] == '*':
			star, from = g, i
			g++
		case g < len(glob) && (glob[g] == '?' || glob[g] == s[i]):
			g++
			i++
		case star >= 0:
			from++
			g, i = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(glob[g:], "*") == ""
}
